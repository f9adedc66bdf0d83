"""The command as a user types it, on a tiny real pipeline; on the demo model in test_demo.py."""

import base64
import functools
import hmac
import json
import shutil
import subprocess
import sys
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import nemo_prune.cli.run
import nemo_prune.engine.localize
import nemo_prune.engine.merge
import nemo_prune.run
import nemo_prune.stages.calibrate
import nemo_prune.stages.localize
import nemo_prune.stages.prove
import nemo_prune.stages.pursue
from benchmarks.kills import counting_samples, kill_when, result, start
from nemo_prune import __version__
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.progress import Stage
from nemo_prune.stages.estimate import TimeEstimate

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MARKER = "zanzibarquokka"


def nemo_prune_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    captions = f"Caption;type;image\na {MARKER} cat;VM;{MARKER}.png\n<b>a dog</b> | **x**;VM;\n"
    (folder / "prompts.csv").write_text(captions, encoding="utf-8")
    Image.radial_gradient("L").save(folder / f"{MARKER}.png")
    (folder / "ordinary.txt").write_text("\n".join(f"{MARKER} {i} {i * i}" for i in range(50)), encoding="utf-8")
    return folder


def run(arguments, *flags, **changes):
    merged = {**arguments, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return nemo_prune_command("run", *[part for item in merged.items() for part in item], *flags)


def assert_named_error(result, *words):
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def finished(few_images, model_folder, prompt_files, tmp_path_factory):
    """A run that pruned the sets of unresolved prompts, with its result and its command."""
    out = tmp_path_factory.mktemp("finished") / "out"
    command = {
        "--model": model_folder,
        "--out": out,
        "--prompts": prompt_files / "prompts.csv",
        "--calibration-prompts": prompt_files / "ordinary.txt",
        "--num-samples": 2,
        "--threshold": 0.01,
    }
    result = run(command, "--include-unresolved", "--json")
    assert result.exit_code == 0, result.output
    return out, result, command


@pytest.fixture
def arguments(finished, tmp_path):
    """A complete command, with a finished calibration; a test changes what it is about.

    The tiny model is random: all prompts are unresolved.
    """
    out, _, command = finished
    calibration = out.with_name("out.work") / "calibration.safetensors"
    return {**command, "--out": tmp_path / "out", "--calibration": calibration}


def test_json_is_one_object_on_stdout_with_what_was_found(finished):
    out, result, _ = finished
    facts = json.loads(result.stdout)
    assert facts["out"] == str(out)
    assert facts["prompts"]["total"] == facts["prompts"]["unresolved"] == 2
    assert facts["mask"]["num_neurons"] == sum(facts["mask"]["counts"].values()) > 0
    assert set(facts["cost"]) == {"mask", "random", "everything"}
    assert next(iter(facts["seconds"])) == "load"


def test_the_output_is_a_complete_folder_that_stock_diffusers_loads(finished):
    out, _, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "README.md", "model_index.json", "nemo_prune", "nemo_prune.json", "scheduler", "text_encoder", "tokenizer",
        "unet", "vae",
    }  # fmt: skip
    assert DiffusionPipeline.from_pretrained(out)("a", num_inference_steps=1).images


def test_nothing_published_names_a_caption_or_a_path_of_the_machine_or_holds_the_key(finished, model_folder):
    """More forms of hidden text, and captions that try to get out, in test_card.py."""
    out, _, command = finished
    key = (out.with_name("out.work") / "prompt_key").read_bytes()
    secrets = [MARKER, "a dog", str(out.parent), str(model_folder.parent), str(command["--prompts"].parent)]
    secrets = [*map(str.encode, secrets), key, key.hex().encode(), base64.b64encode(key)]
    pictures = [path for path in out.rglob("*") if path.suffix == ".png"]
    assert [path.name for path in pictures] == ["neurons_per_layer.png"]
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in secrets:
            assert secret not in content, (path, secret)


def test_the_record_refers_to_prompts_as_the_work_folder_can_look_up(finished):
    out, result, _ = finished
    work = out.with_name("out.work")
    report = json.loads((work / "report.json").read_text())["prompts"]
    captions = {each["reference"]: each["prompt"] for each in report}
    assert set(captions.values()) == {f"a {MARKER} cat", "<b>a dog</b> | **x**"}
    key = (work / "prompt_key").read_bytes()
    assert all(hmac.digest(key, text.encode(), "sha256").hex() == name for name, text in captions.items())
    assert [each["prompt"] for each in json.loads(result.stdout)["prompt_results"]] == sorted(captions)


def test_the_work_folder_holds_what_the_run_knows(finished):
    out, _, _ = finished
    work = out.with_name("out.work")
    header, *records = map(json.loads, (work / "localizations.jsonl").read_text().splitlines())
    assert header["settings"]["theta"] == 5.0 and sum(header["layers"].values()) == 40
    assert {record["prompt"] for record in records} == {f"a {MARKER} cat", "<b>a dog</b> | **x**"}
    assert MARKER in (work / "report.md").read_text()
    assert json.loads((work / "report.json").read_text())["prompts"][0]["kind"] == "VM"
    assert (work / "grids" / "memorized.png").exists() and len(list((work / "images").glob("*.png"))) == 12


def test_the_card_has_its_metadata_and_limits_and_no_placeholder(finished):
    card = ModelCard.load(finished[0] / "README.md")
    assert card.data.license == "other" and card.data.library_name == "diffusers"
    pruned = json.loads(finished[1].stdout)["mask"]["num_neurons"]
    assert card.text.index("It has not forgotten") < card.text.index(f"{pruned} of 40 neurons")
    assert "| images of 2 memorized prompts that copy any training image" in card.text
    assert "{" not in card.text.split("## Citation")[0].split("```")[0]
    assert "--license" in finished[1].stderr and "No licence text" in finished[1].stderr


def test_inspect_shows_the_mask_of_a_folder_and_of_a_file(finished):
    out, result, _ = finished
    facts = json.loads(result.stdout)
    for path in (out, out / "nemo_prune" / "mask.safetensors"):
        shown = json.loads(nemo_prune_command("inspect", path, "--json").stdout)
        assert {name: len(rows) for name, rows in shown["rows"].items()} == facts["mask"]["counts"]
        assert shown["metadata"]["settings"]["theta"] == 5.0
        needed = shown["metadata"]["prompts_per_neuron"]
        assert {(name, int(row)) for name in needed for row in needed[name]} == {
            (name, row) for name, rows in shown["rows"].items() for row in rows
        }
        assert all(1 <= number <= 2 for counts in needed.values() for number in counts.values())
    table = nemo_prune_command("inspect", out)
    assert "neurons pruned" in table.stdout and "theta: 5.0" in table.stdout
    assert_named_error(nemo_prune_command("inspect", out / "vae"), "mask")


def test_the_same_command_goes_on_from_the_work_folder_and_gives_the_same_bytes(finished, monkeypatch):
    out, _, command = finished
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert_named_error(run(command, "--include-unresolved"), "--overwrite")

    def not_again(*arguments):
        raise AssertionError("the work folder knows it")

    monkeypatch.setattr(nemo_prune.engine.localize, "detect", not_again)
    monkeypatch.setattr(nemo_prune.stages.calibrate, "fit_calibration", not_again)
    stated = {"license": "other", "license_name": "Our Terms"}
    record = json.loads((out / "nemo_prune.json").read_text())
    again = run(command, "--include-unresolved", "--overwrite", "--publish-examples", **stated)
    assert again.exit_code == 0, again.output
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    card = ModelCard.load(out / "README.md")
    assert f"- `a {MARKER} cat`" in card.text and "before_after.png" in card.text
    assert "<b>" not in MarkdownIt("commonmark", {"html": True}).render(card.text)
    assert (card.data.license, card.data.license_name) == tuple(stated.values())
    assert json.loads((out / "nemo_prune.json").read_text())["prompt_results"] == record["prompt_results"]


@pytest.mark.slow
def test_a_torn_last_line_is_done_again(finished, arguments, tmp_path):
    out, _, _ = finished
    work = tmp_path / "work"
    shutil.copytree(out.with_name("out.work"), work)
    log = work / "localizations.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1] + lines[2][:50])
    result = run(arguments, "--include-unresolved", work=work)
    assert result.exit_code == 0, result.output
    whole, again = (
        {found["prompt"]: found["neurons"] for found in map(json.loads, content[1:])}
        for content in (lines, log.read_bytes().splitlines())
    )
    assert again == whole


def test_a_work_folder_of_other_settings_is_refused_and_says_what_changed(finished, arguments):
    work = finished[0].with_name("out.work")
    assert_named_error(run(arguments, work=work, seed=5), "settings", "--overwrite")
    assert (work / "localizations.jsonl").exists()


def test_an_interruption_exits_130_and_loses_nothing(arguments, tmp_path, monkeypatch):
    original = nemo_prune.engine.localize.localize_prompts

    def interrupted(*inner, **named):
        yield next(original(*inner, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(nemo_prune.stages.localize, "localize_prompts", interrupted)
    result = run(arguments)
    assert result.exit_code == 130 and "again to resume" in result.stderr
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.work" / "localizations.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_limit_on_what_ordinary_captions_lose_spares_neurons_and_the_record_has_the_curve(finished, arguments):
    result = run(arguments, "--include-unresolved", "--json", max_utility_loss=0.5)
    assert result.exit_code == 0, result.output
    facts, whole = json.loads(result.stdout), json.loads(finished[1].stdout)
    curve = facts["spared"]
    numbers = [point["neurons"] for point in curve]
    assert numbers == sorted(set(numbers), reverse=True) and numbers[-1] == 0
    assert curve[-1]["change"] == pytest.approx(0, abs=1e-4)
    assert curve[0]["neurons"] == whole["mask"]["num_neurons"] > facts["mask"]["num_neurons"]
    (taken,) = [point for point in curve if point["neurons"] == facts["mask"]["num_neurons"]]
    assert curve[0]["change"] > 0.5 >= taken["change"]


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_an_undisturbed_one(finished, arguments, tmp_path):
    out = arguments.pop("--out")
    options = ["--include-unresolved", "--no-verify", *(str(part) for item in arguments.items() for part in item)]
    # Its images are more than those of the run in this process; mask and weights are the same.
    for there_is in ("run.json", "localizations.jsonl", "images/*.png"):
        kill_when(there_is, options, out)
    assert start(options, out, "run").wait() == 0
    assert result(out) == result(finished[0])


@pytest.mark.slow
def test_what_every_stage_kept_is_not_computed_again(finished, arguments, tmp_path, monkeypatch):
    """Scores under the mask and images, each stopped half way; the calibration in test_work.py."""
    out, _, _ = finished
    work = tmp_path / "work"
    shutil.copytree(out.with_name("out.work"), work)
    verified = (work / "verified.jsonl").read_bytes().splitlines(keepends=True)
    (work / "verified.jsonl").write_bytes(b"".join(verified[:2]))
    (work / "images" / "002_after_1.png").unlink()
    prove = nemo_prune.stages.prove
    spies = {name: Mock(wraps=getattr(prove, name)) for name in ("score_under_mask", "draw_captions")}
    for name, spy in spies.items():
        monkeypatch.setattr(prove, name, spy)
    looked = Mock(wraps=nemo_prune.stages.pursue.draw_captions)
    monkeypatch.setattr(nemo_prune.stages.pursue, "draw_captions", looked)
    assert run(arguments, "--include-unresolved", work=work).exit_code == 0
    assert [spy.call_count for spy in spies.values()] == [1, 1] and not looked.called
    assert (work / "verified.jsonl").read_bytes() == b"".join(verified)
    assert result(tmp_path / "out") == result(out)


def test_hardly_anything_is_computed_where_all_is_kept(finished, arguments, tmp_path):
    """Two batches tell how long it will take, and some passes prove what is written; the first run took hundreds."""
    work = tmp_path / "work"
    shutil.copytree(finished[0].with_name("out.work"), work)
    passes = []
    with counting_samples(passes.append):
        assert run(arguments, "--include-unresolved", work=work).exit_code == 0
    assert 0 < sum(passes) < 40


@pytest.mark.slow
def test_a_run_gathers_evidence_on_its_own_images_and_does_it_once(arguments, tmp_path, monkeypatch):
    evidence = functools.partial(nemo_prune.cli.run.VerificationSettings, evidence_budget=1500)
    monkeypatch.setattr(nemo_prune.cli.run, "VerificationSettings", evidence)
    # Ten more than a calibration needs: these are held out.
    (tmp_path / "ordinary.txt").write_text("\n".join(f"{MARKER} {i} {i * i}" for i in range(60)), encoding="utf-8")
    arguments["--calibration-prompts"] = tmp_path / "ordinary.txt"
    result = run(arguments, "--include-unresolved", "--json")
    assert result.exit_code == 0, result.output
    facts, work = json.loads(result.stdout), tmp_path / "out.work"
    found = facts["evidence"]
    assert set(found["passes"]) == {"replication", "utility", "attack"} and "recall" in found["left_out"]
    assert found["passes"]["replication"] == 0 and found["replication"]["all"]["captions"] == 2
    assert found["utility"]["captions"] == 4 and found["attacks"]
    card, report = (tmp_path / "out" / "README.md").read_text(), (work / "report.html").read_text()
    assert "## What it still gives back" in card and "attack of 50 steps" in card
    assert MARKER not in card and MARKER in report
    lines = (work / "run_evidence" / "attack.jsonl").read_bytes()
    again = run({**arguments, "--out": tmp_path / "again"}, "--include-unresolved", "--json", work=work)
    assert json.loads(again.stdout)["evidence"] == found
    assert (work / "run_evidence" / "attack.jsonl").read_bytes() == lines
    silent = run(
        {**arguments, "--out": tmp_path / "silent"}, "--include-unresolved", "--no-verify", "--json", work=work
    )
    assert json.loads(silent.stdout)["evidence"] is None
    assert "still gives back" not in (tmp_path / "silent" / "README.md").read_text()


@pytest.mark.slow
def test_the_base_is_looked_through_once_in_a_run(finished, arguments, model_folder, tmp_path, monkeypatch):
    work, scanned = tmp_path / "work", Counter()
    shutil.copytree(finished[0].with_name("out.work"), work)

    def counted(base):
        scanned[base] += 1
        return scan_folder(base)

    for name, module in list(sys.modules.items()):
        if name.startswith("nemo_prune.") and getattr(module, "scan_folder", None) is scan_folder:
            monkeypatch.setattr(module, "scan_folder", counted)
    assert run(arguments, "--include-unresolved", work=work).exit_code == 0
    assert scanned == {model_folder: 1}
    # A comparison looks through both folders: what the count is held against.
    assert nemo_prune_command("diff", model_folder, tmp_path / "out").exit_code == 0
    assert scanned[model_folder] > 1


def test_nothing_to_prune_says_so_exits_0_and_writes_no_model(arguments, tmp_path):
    result = run(arguments)
    assert result.exit_code == 0, result.output
    assert "nothing to prune" in result.stdout and not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "report.md").exists()


@pytest.mark.slow
def test_a_run_scales_the_rows_of_keys_and_values(arguments, tmp_path, model_folder):
    del arguments["--calibration"]
    changes = {"projections": "both", "scale": -0.3}
    result = run(arguments, "--include-unresolved", "--json", **changes)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert len(facts["mask"]["counts"]) == 14 and facts["mask"]["scale"] == -0.3
    before, after = (load_file(folder / WEIGHTS) for folder in (model_folder, tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    rows = [(before[name][row], after[name][row]) for name in changed for row in range(len(before[name]))]
    scaled = [pair for pair in rows if not torch.equal(*pair)]
    assert len(scaled) == facts["mask"]["num_neurons"] > 0
    assert all(torch.allclose(new, old * -0.3) for old, new in scaled)
    assert "multiplied by -0.3" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_writes_a_single_file_with_all_else_in_a_folder_beside_it(finished, arguments, model_folder, tmp_path):
    out = tmp_path / "pruned.safetensors"
    result = run({**arguments, "--out": out}, "--include-unresolved", "--json")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "pruned.nemo_prune", "pruned.work"}
    beside = {path.name for path in (tmp_path / "pruned.nemo_prune").iterdir()}
    assert beside == {"README.md", "nemo_prune.json", "mask.safetensors", "neurons_per_layer.png"}
    pipe = StableDiffusionPipeline.from_single_file(str(out), config=str(model_folder), local_files_only=True)
    expected = load_file(finished[0] / WEIGHTS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.unet.state_dict().items())
    shown = nemo_prune_command("diff", model_folder, out)
    assert shown.exit_code == 0, shown.output
    inside = run({**arguments, "--out": out, "--work": tmp_path / "pruned.nemo_prune" / "work"}, "--overwrite")
    assert_named_error(inside, "can be published")


def test_a_run_that_will_take_long_says_so_and_goes_on(arguments, monkeypatch):
    slow = TimeEstimate(60.0, dict.fromkeys(Stage, (0.0, 0.0)) | {Stage.LOCALIZE: (1680.0, 16_800.0)})
    monkeypatch.setattr(nemo_prune.run, "estimate_run", lambda *given: slow)
    result = run(arguments, "--json", threshold=0.999999)
    assert result.exit_code == 0 and "2 prompts will take 28 hours" in result.stderr
    assert json.loads(result.stdout)["prompts"]["total"] == 2


def test_a_threshold_of_ones_own_decides(arguments):
    result = run(arguments, "--json", threshold=0.999999)
    assert json.loads(result.stdout)["prompts"]["not_memorized"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "./nowhere"}, ["no model at", "demo"]),
        ({"model": "a/b/c"}, ["no model at"]),
        ({"scale": 1}, ["scale", "other than 1"]),
        ({"license": "My Licence"}, ["license", "identifier"]),
        ({"base_model": "../tiny"}, ["--base-model", "Hub id"]),
        ({"num_samples": 1}, ["--num-samples"]),
        ({"threshold": 2}, ["threshold", "between 0 and 1"]),
        ({"prompts": "nowhere.txt"}, ["no prompts file"]),
        ({"device": "cuda:9"}, ["cuda:9"]),
    ],
)
def test_bad_arguments_are_named_errors(arguments, changes, words):
    assert_named_error(run(arguments, **changes), *words)


@pytest.mark.parametrize(
    ("option", "typed", "choices"),
    [
        ("preset", "fast", ["released-code", "paper"]),
        ("projections", "query", ["value", "key", "both"]),
        ("merge", "sum", ["union", "minimal"]),
        ("dtype", "int4", ["auto", "float32", "float16", "bfloat16"]),
    ],
)
def test_a_choice_that_does_not_exist_is_a_usage_error_that_lists_the_others(arguments, option, typed, choices):
    result = run(arguments, **{option: typed})
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in (f"--{option}", typed, *choices))


def test_a_folder_that_is_no_pipeline_is_refused(arguments, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_named_error(run(arguments, model=tmp_path / "folder"), "model_index.json")
    (tmp_path / "folder" / "model_index.json").write_text('{"transformer": ["a", "b"]}')
    assert_named_error(run(arguments, model=tmp_path / "folder"), "no unet")


def test_a_model_without_prompts_of_its_own_says_which_options_to_give(model_folder, tmp_path):
    result = nemo_prune_command("run", "--model", model_folder, "--out", tmp_path / "out")
    assert_named_error(result, "--prompts", "--calibration-prompts")


def test_too_few_calibration_prompts_are_refused(arguments, tmp_path):
    del arguments["--calibration"]
    (tmp_path / "few.txt").write_text("\n".join(f"caption {i}" for i in range(49)))
    assert_named_error(run(arguments, calibration_prompts=tmp_path / "few.txt"), "at least 50", "got 49")


def test_a_target_that_holds_something_is_refused_before_any_work(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert_named_error(run(arguments), "not empty", "--overwrite")
    assert not (tmp_path / "out.work").exists() and (tmp_path / "out" / "thesis.tex").exists()


def test_work_inside_the_output_and_output_inside_the_model_are_refused(arguments, model_folder, tmp_path):
    assert_named_error(run(arguments, work=tmp_path / "out" / "work"), "can be published")
    assert_named_error(run(arguments, out=model_folder / "out"), "model's own folder")


def test_a_full_disk_is_known_before_the_work(arguments, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert_named_error(run(arguments), "free", "--out")


def test_weights_with_nan_are_refused(arguments, model_folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    path = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    assert_named_error(run(arguments, model=damaged), "conv_in.bias", "NaN")


def test_a_training_image_that_can_not_be_read_is_named(arguments, tmp_path):
    (tmp_path / "prompts.csv").write_text("caption,image\na,nowhere.png\n")
    assert_named_error(run(arguments, prompts=tmp_path / "prompts.csv"), "nowhere.png", "image")


def test_version_and_usage_errors():
    assert nemo_prune_command("--version").stdout.strip() == __version__
    assert nemo_prune_command("run", "--out", "x").exit_code == 2


def test_help_does_not_wait_for_torch():
    program = (
        "import sys, nemo_prune.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(nemo_prune.cli.app, ['run', '-h']).exit_code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
