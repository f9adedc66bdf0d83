"""The screening as a user types it, on a tiny real pipeline; it knows nothing, so that marked values are planted."""

import functools
import json
import subprocess
import sys
import time
from zlib import crc32

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

import nemo_prune.cli.screen
import nemo_prune.screening.screen
from nemo_prune.cli import app
from nemo_prune.corpus.prompts import Prompt, read_prompts
from nemo_prune.corpus.stream import CaptionStream, kind_of
from nemo_prune.errors import PromptError
from nemo_prune.files.pictures import save_distributions
from nemo_prune.models.demo import CALIBRATION_FILE, demo_folder
from nemo_prune.proof.images import seed_agreement
from nemo_prune.screening.screened import read_passed
from nemo_prune.screening.sieves import Sieves

NUM_ORDINARY = 50


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    rows = [f"star {i};{'VM' if i % 2 else 'TM'};{i}" for i in range(6)] + [f"thing {i};0;{i}" for i in range(20)]
    rows += ["thing 3;0;3", "thing 4;;4"]
    (folder / "corpus.csv").write_text("caption;label;score\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "ordinary.txt").write_text("\n".join(f"other {i}" for i in range(NUM_ORDINARY)), encoding="utf-8")
    (folder / "things.txt").write_text("\n".join(f"thing {i}" for i in range(20)), encoding="utf-8")
    return folder


def planted_values(captions):
    """Stars get high values, all others low ones by chance."""
    return [crc32(caption.encode()) % 1000 / 1000 + 100 * caption.startswith("star") for caption in captions]


@pytest.fixture
def planted(monkeypatch):
    """Screenings without a pass; the fixture `screened` makes them."""
    nothing = lambda session, chunk: ({"prompt": text, "value": 0.5} for text in chunk)  # noqa: E731
    monkeypatch.setattr(nemo_prune.screening.screen, "score_chunk", nothing)
    monkeypatch.setattr(Sieves, "values", lambda self, captions: dict.fromkeys(self.names, planted_values(captions)))


def run_screen(*flags, **options):
    arguments = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return CliRunner().invoke(app, ["screen", *arguments, *flags])


@pytest.fixture
def screen(model_folder, files, tmp_path):
    given = {"model": model_folder, "out": tmp_path / "out.parquet", "prompts": files / "corpus.csv",
             "calibration_prompts": files / "ordinary.txt", "device": "cpu"}  # fmt: skip
    return lambda *flags, **changes: run_screen(*flags, **{**given, **changes})


@pytest.fixture(scope="module")
def screened(model_folder, files, tmp_path_factory):
    """The facts and the file of a screening whose passes were made, and their values replaced."""
    out = tmp_path_factory.mktemp("screened") / "out.parquet"
    original = Sieves.values

    def values(self, captions):
        return dict.fromkeys(original(self, captions), planted_values(captions))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sieves, "values", values)
        result = run_screen(
            "--json", model=model_folder, out=out, prompts=files / "corpus.csv", sieve="norm", device="cpu",
            calibration_prompts=files / "ordinary.txt", label_column="label",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out


def assert_named_error(result, *words):
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.stderr


def test_what_stands_out_passes_and_the_file_is_sorted_with_its_columns(screened):
    facts, out = screened
    assert (facts["prompts"], facts["duplicates"], facts["passed"]) == (26, 2, 6)
    assert facts["sample_passes_per_prompt"] <= 1.1 and facts["prompts_per_second"] > 0
    assert facts["cut"]["ordinary_above"] == 0 and facts["cut"]["fdr"] <= 0.1 < facts["cut"]["fdr_high"]
    assert set(facts["separation"]) == {"norm"}
    assert {kind: found["num_memorized"] for kind, found in facts["separation"]["norm"].items()} == {
        "TM": 3, "VM": 3, "memorized": 6,
    }  # fmt: skip
    assert facts["separation"]["norm"]["VM"]["auroc"]["value"] == 1.0
    rows = pyarrow.parquet.read_table(out).to_pylist()
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True) and len({row["prompt"] for row in rows}) == 26
    assert all(row["passed"] == row["prompt"].startswith("star") for row in rows)
    assert all((row["memorization_score"] is not None) == row["passed"] for row in rows)
    assert rows[0]["label"] in ("VM", "TM") and rows[0]["norm"] == rows[0]["score"]
    corpus = read_passed(out)
    assert [prompt.text for prompt in corpus.prompts] == [row["prompt"] for row in rows[:6]]
    with Image.open(facts["distributions"]) as picture:
        assert len(set(picture.getdata())) > 5


def test_a_model_that_memorizes_nothing_gets_no_cut_and_is_told_so(screen, planted, files, tmp_path):
    result = screen(prompts=files / "things.txt", out=tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "No cut" in result.stdout and "none stands out" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and not any(row["passed"] for row in rows)
    with pytest.raises(PromptError, match="nothing to localize"):
        read_passed(tmp_path / "out.jsonl")


@pytest.mark.slow
def test_a_stop_loses_nothing_and_a_work_folder_of_something_else_is_refused(screen, planted, tmp_path, monkeypatch):
    assert screen(out=tmp_path / "whole.jsonl").exit_code == 0
    few_at_once = functools.partial(nemo_prune.cli.screen.ScreenOptions, captions_at_once=10)
    monkeypatch.setattr(nemo_prune.cli.screen, "ScreenOptions", few_at_once)
    original, calls = Sieves.values, []

    def values(self, captions):
        calls.append(len(captions))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(self, captions)

    monkeypatch.setattr(Sieves, "values", values)
    arguments = {"out": tmp_path / "out.jsonl", "work": tmp_path / "work"}
    assert screen(**arguments).exit_code == 130 and not (tmp_path / "out.jsonl").exists()
    log = tmp_path / "work" / "sieved.jsonl"
    # What its places belong to, and one chunk.
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"first": 10, "norm": [1')
    assert screen(**arguments).exit_code == 0
    assert calls[7:] == [10, 6]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert_named_error(screen(**arguments), "exists", "--overwrite")
    (tmp_path / "out.jsonl").unlink()
    changed = screen(**arguments, limit=10, sieve="norm", seed=3)
    assert_named_error(changed, "changed since: prompts, settings, sieve.", "--overwrite")


def test_too_few_ordinary_captions_are_told_with_the_number_that_would_do(screen, planted, tmp_path):
    result = screen(fdr=0.01)
    assert result.exit_code == 0, result.output
    # 26 / (N + 1) / 6 <= 1%
    assert "50 ordinary ones are too few" in result.stdout and "about 433" in result.stdout
    assert not any(pyarrow.parquet.read_table(tmp_path / "out.parquet")["passed"].to_pylist())


def test_confirmation_draws_images_of_what_passed_alone(screen, planted, tmp_path, monkeypatch):
    drawn = []

    def draw(pipe, text, settings):
        drawn.append((text, settings.guidance_scale))
        noise = np.random.default_rng(len(drawn)).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        return [Image.fromarray(each) for each in (noise[:1].repeat(3, axis=0) if text == "star 1" else noise)]

    monkeypatch.setattr(nemo_prune.screening.screen, "draw_images", draw)
    result = screen("--confirm", "--json", guidance_scale=4)
    assert result.exit_code == 0, result.output
    assert sorted(drawn) == [(f"star {i}", 4.0) for i in range(6)]
    assert json.loads(result.stdout)["confirmed"] == 1
    agreement = {
        row["prompt"]: row["image_agreement"]
        for row in pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    }
    assert agreement["star 1"] > 0.99 > 0.5 > agreement["star 2"] and agreement["thing 1"] is None


def test_run_localizes_what_passed(screened, files, model_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "nemo_prune.run.prune_model", lambda source, corpus, *rest: seen.extend(corpus.prompts) or 1 / 0
    )
    common = ["run", "--model", str(model_folder), "--calibration-prompts", str(files / "ordinary.txt"), "--out",
              str(tmp_path / "pruned"), "--from-screen", str(screened[1]), "--limit", "4"]  # fmt: skip
    assert isinstance(CliRunner().invoke(app, common).exception, ZeroDivisionError)
    assert len(seen) == 4 and all(prompt.text.startswith("star") for prompt in seen)
    assert_named_error(CliRunner().invoke(app, [*common, "--prompts", "x.txt"]), "--from-screen")
    common[common.index("--from-screen") + 1] = str(files / "corpus.csv")
    assert_named_error(CliRunner().invoke(app, common), "no column")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": "out.csv"}, ["out", ".parquet or .jsonl"]),
        ({"fdr": 1.5}, ["fdr", "between 0 and 1"]),
        ({"label_column": "nothing"}, ["nothing", "--label-column"]),
        ({"label_column": "score"}, ["score", "`2`", "vm, tm"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_is_loaded(screen, monkeypatch, changes, words):
    monkeypatch.setattr("nemo_prune.compute.local.load_pipeline", lambda *arguments: pytest.fail("loaded"))
    assert_named_error(screen(**changes), *words)


def test_a_sieve_that_does_not_exist_is_a_usage_error_that_lists_the_others(screen):
    result = screen(sieve="cosine")
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in ("--sieve", "cosine", "norm", "anisotropy"))


def test_labels_of_many_tables_are_understood():
    kinds = {
        "VM": "VM",
        "tm": "TM",
        "1": "memorized",
        "True": "memorized",
        "0": "ordinary",
        "none": "ordinary",
        "": None,
    }
    for label, kind in kinds.items():
        assert kind_of(Prompt("a", columns={"label": label}), "label") == kind
        assert kind_of(Prompt("a", label), "type") == kind


def test_a_stream_reads_again_and_notices_a_change():
    texts = ["a", "b", "a", "c", "d"]
    stream = CaptionStream(lambda: map(Prompt, texts), limit=3)
    assert (stream.num_prompts, stream.num_duplicates) == (3, 1)
    assert [prompt.text for prompt in stream] == [prompt.text for prompt in stream] == ["a", "b", "c"]
    texts[1] = "e"
    with pytest.raises(PromptError, match="changed while it was read"):
        list(stream)


def test_a_single_value_and_an_empty_group_can_be_drawn(tmp_path):
    save_distributions(tmp_path / "a.png", {"norm": {"x": np.ones(3), "y": np.array([])}}, {"norm": 1.0})
    assert (tmp_path / "a.png").stat().st_size > 500


def test_agreement_is_that_of_the_images_with_each_other():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert (
        seed_agreement([picture] * 3) > 0.999 > 0.5 > seed_agreement([picture, picture.rotate(90), picture.rotate(180)])
    )


@pytest.mark.slow
def test_a_killed_screening_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    command = [sys.executable, "-m", "nemo_prune.cli", "screen", "--model", "demo", "--label-column", "type", "--json"]
    ordinary = [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)][:120]
    (tmp_path / "ordinary.txt").write_text("\n".join(ordinary))
    command += ["--calibration-prompts", str(tmp_path / "ordinary.txt")]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "work" / "sieved.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 1) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["separation"]["anisotropy"]["VM"]["auroc"]["value"] >= 0.98
    assert facts["sample_passes_per_prompt"] <= 2.1
    undisturbed = subprocess.run(
        [*command[:-3], str(tmp_path / "other"), "--out", str(tmp_path / "other.jsonl")], capture_output=True, text=True
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "other.jsonl").read_text()
