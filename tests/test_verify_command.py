"""`nemo-prune verify` as a user types it, for any two models."""

import functools
import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from nemo_prune.cli import app
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof import evidence
from nemo_prune.proof.attack import AttackSettings
from test_proofs import ORDINARY, pruned

FEW = ("--steps", "2", "--budget", "400")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Of what no option sets."""
    attack = AttackSettings(steps=4, batch_size=2, looks=(0, 2, 4), images_per_look=1, drawing_steps=1)
    shorter = functools.partial(evidence.EvidenceSettings, attack=attack, quick_steps=2)
    monkeypatch.setattr(evidence, "EvidenceSettings", shorter)


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def models(pipe, model_folder, tmp_path_factory):
    """Options for base, candidate and captions."""
    folder = tmp_path_factory.mktemp("models")
    candidate, _ = pruned(pipe, folder / "tokenizer")
    candidate.save_pretrained(folder / "candidate")
    Image.radial_gradient("L").save(folder / "cat.png")
    (folder / "prompts.csv").write_text("Caption,type,image\na cat zanzibar,VM,cat.png\ntwo ships,TM,gone.png\n")
    (folder / "ordinary.txt").write_text("\n".join(ORDINARY))
    return {
        "--base": model_folder,
        "--candidate": folder / "candidate",
        "--prompts": folder / "prompts.csv",
        "--ordinary": folder / "ordinary.txt",
    }


def spread(options):
    return [part for item in options.items() for part in item]


@pytest.mark.slow
def test_any_two_models_are_judged_and_the_json_has_everything(models):
    result = verify(*spread(models), *FEW, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {
        "summary", "captions", "attack_runs", "recall", "not_available", "broken_limits", "report"
    }  # fmt: skip
    assert [each["prompt"] for each in found["captions"]] == ["a cat zanzibar", "two ships"]
    assert found["summary"]["candidate"]["name"] == "candidate" and list(found["not_available"]) == ["two ships"]
    work = models["--candidate"].with_name("candidate.evidence")
    assert found["report"] == str(work / "report.html") and (work / "report.html").is_file()
    assert "two ships" in result.stderr and "not available" in result.stderr


@pytest.mark.slow
def test_a_broken_limit_is_exit_code_1_and_a_kept_one_is_not(models):
    kept = verify(*spread(models), *FEW, "--max-replication", 1, "--max-utility-loss", 10)
    assert kept.exit_code == 0 and "Limit broken" not in kept.stdout and "memorized captions drawn" in kept.stdout
    broken = verify(*spread(models), *FEW, "--max-utility-loss", 0)
    assert broken.exit_code == 1 and "Limit broken: The utility loss is" in " ".join(broken.stdout.split())
    assert "Error:" not in broken.stderr


@pytest.mark.slow
def test_a_release_is_judged_beside_the_base_that_it_names(models, model_folder, tmp_path):
    options = {key: value for key, value in models.items() if key in ("--prompts", "--ordinary")}
    shutil.copytree(models["--candidate"], tmp_path / "out")
    without_record = verify(tmp_path / "out", *spread(options), *FEW)
    assert without_record.exit_code == 1 and "There is no nemo_prune.json" in without_record.stderr
    named = verify(tmp_path / "out", "--base", model_folder, *spread(options), *FEW)
    assert named.exit_code == 0, named.output
    assert (tmp_path / "out.work" / "evidence" / "report.html").is_file()
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_release_of_a_local_base_asks_for_the_base(pipe, model_folder, models, tmp_path):
    sizes = layer_sizes(find_text_projections(pipe.unet))
    NeuronMask.from_neurons([Neuron(next(iter(sizes)), 1)], sizes).save(tmp_path / "mask.safetensors")
    command = ["export", "--model", model_folder, "--mask", tmp_path / "mask.safetensors", "--out", tmp_path / "out"]
    exported = CliRunner().invoke(app, [*map(str, command), "--force"])
    assert exported.exit_code == 0, exported.output
    result = verify(tmp_path / "out", "--prompts", models["--prompts"], "--ordinary", models["--ordinary"], *FEW)
    assert result.exit_code == 1 and "Name the base with --base" in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--budget": "much"}, "--budget is much"),
        ({"--budget": "0m"}, "--budget is 0m"),
        ({"--candidate": "./nothing"}, "There is no model at ./nothing"),
        ({"--sscd": "nothing.pt"}, "no copy detector at nothing.pt"),
        ({"--prompts": None}, "Name a file of them with --prompts"),
        ({"--ordinary": None}, "Name a file of them with --ordinary"),
        ({"--base": None}, "Name the unpruned model with --base"),
        ({"--candidate": None, "--base": None}, "Give either a release"),
    ],
)
def test_what_is_wrong_is_named(models, changes, words):
    merged = {key: value for key, value in {**models, **changes}.items() if value is not None}
    result = verify(*spread({"--steps": 2, **merged}))
    assert result.exit_code == 1 and "Error: " in result.stderr and "Traceback" not in result.stderr, result.output
    assert words in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_work_folder_of_other_models_and_a_folder_of_something_else_are_refused(models, model_folder, tmp_path):
    work, same = tmp_path / "work", {**models, "--candidate": model_folder}
    assert verify(*spread(models), *FEW, "--work", work).exit_code == 0
    refused = verify(*spread(same), *FEW, "--work", work)
    assert refused.exit_code == 1 and "changed since: candidate" in refused.stderr
    assert verify(*spread(same), *FEW, "--work", work, "--overwrite").exit_code == 0
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "photos" / "images" / "mine.png").write_text("mine")
    refused = verify(*spread(models), *FEW, "--work", tmp_path / "photos")
    assert refused.exit_code == 1 and "not a work folder" in refused.stderr
    assert (tmp_path / "photos" / "images" / "mine.png").read_text() == "mine"


def test_the_work_folder_must_not_be_in_what_can_be_published(models):
    result = verify(*spread(models), *FEW, "--work", models["--candidate"] / "work")
    assert result.exit_code == 1 and "must not be in the candidate's" in result.stderr
