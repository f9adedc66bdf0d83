"""The effect, on the demo model that really memorizes, each with its negative control."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import merging
from benchmarks.oracle import Oracle, agrees
from examples.demo_training import measure as measuring
from examples.demo_training import picture
from nemo_prune.cli import app
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.localize import Localizer, detect, localize_prompt, localize_prompts
from nemo_prune.engine.merge import settle_mask, union_mask
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import OutputError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE, demo_folder, write_demo
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline, resolve_model
from nemo_prune.progress import Stage
from nemo_prune.proof.cost import matched_random_mask
from nemo_prune.proof.drawing import Drawing
from nemo_prune.proof.images import copy_similarities, draw_images
from nemo_prune.settings import LocalizationSettings, Plan, VerificationSettings
from nemo_prune.stages.estimate import passes_of_stages

LESS = {"max_prompts": 5, "evidence_budget": 0, "num_inference_steps": 15}
# The command with LESS, which leaves how many latents went through a U-Net in each stage.
COUNTING = f"""
import collections, contextlib, functools, json
from diffusers import UNet2DConditionModel
import nemo_prune.cli.run as command
from nemo_prune.engine.gates import BACKWARD_PASSES
from nemo_prune.progress import Timed

command.VerificationSettings = functools.partial(command.VerificationSettings, **{LESS})
passes, stages, forward, stage = collections.Counter(), [], UNet2DConditionModel.forward, Timed.stage

def counted(self, sample, *arguments, **more):
    output = forward(self, sample, *arguments, **more)
    passes[stages[-1] if stages else "between"] += len(sample) * (1 + BACKWARD_PASSES * output[0].requires_grad)
    return output

@contextlib.contextmanager
def noted(self, entered):
    stages.append(entered.key)
    with stage(self, entered) as advance:
        yield advance
    stages.pop()
    with open("passes.json", "w") as file:
        json.dump(passes, file)

UNet2DConditionModel.forward, Timed.stage = counted, noted
command.app()
"""
VERIFICATION = VerificationSettings(guidance_scale=DEMO.guidance_scale, images_per_prompt=2)


@pytest.fixture(scope="module")
def demo_pipe():
    return load_pipeline(demo_folder(), "cpu", torch.float32)


@pytest.fixture(scope="module")
def predictor(demo_pipe):
    return NoisePredictor(demo_pipe, LocalizationSettings())


@pytest.fixture(scope="module")
def scorer(predictor):
    return Scorer(predictor)


@pytest.fixture(scope="module")
def calibration(scorer):
    texts = [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)]
    return calibrate(scorer, texts[:50])


@pytest.fixture(scope="module")
def memorized():
    """A verbatim memorized caption with its training image."""
    return next(prompt for prompt in read_prompts(demo_folder() / PROMPTS_FILE) if prompt.kind == "VM")


@pytest.fixture(scope="module")
def localizer(scorer, calibration):
    return Localizer(scorer, calibration, calibration.threshold)


@pytest.fixture(scope="module")
def localization(localizer, memorized):
    return localize_prompt(localizer, memorized.text)


@pytest.fixture(scope="module")
def mask(predictor, localization):
    return NeuronMask.from_neurons(localization.neurons, predictor.sizes)


def copies(pipe, prompt):
    """How many of two images are copies of the prompt's training image."""
    images = draw_images(pipe, prompt.text, VERIFICATION)
    similarities = copy_similarities(images, [Image.open(prompt.image)])
    return int((similarities >= VERIFICATION.replication_cut).sum())


def test_the_demo_is_what_its_files_say(demo_pipe, predictor):
    prompts = read_prompts(demo_folder() / PROMPTS_FILE)
    kinds = [prompt.kind for prompt in prompts]
    assert kinds.count("VM") >= 16 and kinds.count("TM") >= 4
    assert all(prompt.image.exists() for prompt in prompts)
    calibration, test = (
        {prompt.text for prompt in read_prompts(demo_folder() / name)} for name in (CALIBRATION_FILE, TEST_FILE)
    )
    assert len(calibration) >= 256 and len(test) >= 64
    assert not calibration & test and not (calibration | test) & {prompt.text for prompt in prompts}
    assert len(predictor.layers) == 7
    size = sum(path.stat().st_size for path in demo_folder().rglob("*") if path.is_file())
    assert size < 25e6


def test_a_memorized_caption_is_localized_and_its_neurons_are_enough(localization, calibration):
    assert localization.status == "localized"
    assert localization.score > calibration.threshold > localization.neurons_score
    assert set(localization.neurons) <= set(localization.candidates)


def test_no_single_neuron_can_be_spared(scorer, calibration, memorized, localization):
    (scored,) = scorer.score_prompts([memorized.text])
    for neuron in localization.neurons:
        others = set(localization.neurons) - {neuron}
        assert max(scorer.suppressed_similarities(scored, localization.kept_seeds, others)) >= calibration.threshold


@pytest.mark.slow
def test_pruning_stops_the_copies_and_random_neurons_do_not(demo_pipe, calibration, memorized, mask):
    assert copies(demo_pipe, memorized) == 2
    with apply_mask(demo_pipe, mask):
        assert copies(demo_pipe, memorized) == 0
    with apply_mask(demo_pipe, matched_random_mask(mask, calibration.statistics.mean, seed=0)):
        assert copies(demo_pipe, memorized) == 2


def test_ordinary_captions_score_lower(scorer, localization):
    texts = [prompt.text for prompt in read_prompts(demo_folder() / TEST_FILE)[:8]]
    scores = [scored.memorization.score for scored in scorer.score_prompts(texts)]
    assert max(scores) < localization.score - 0.05


def test_the_random_control_is_as_large_in_the_same_layers_and_outside(predictor, calibration):
    chosen = [Neuron(layer, index) for layer in predictor.layers for index in (0, 5, 9)]
    mask = NeuronMask.from_neurons(chosen, predictor.sizes)
    control = matched_random_mask(mask, calibration.statistics.mean, seed=3)
    assert control.counts == mask.counts and not set(control.neurons) & set(chosen)
    again = matched_random_mask(mask, calibration.statistics.mean, seed=3)
    assert again.neurons == control.neurons


def test_demo_writes_a_folder_that_can_be_run_by_path(tmp_path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "demo")])
    assert result.exit_code == 0 and f"--model {tmp_path / 'demo'}" in result.stdout
    assert (tmp_path / "demo" / "training_images").is_dir()
    assert resolve_model(str(tmp_path / "demo")).folder == (tmp_path / "demo").resolve()
    with pytest.raises(OutputError, match="not empty"):
        write_demo(tmp_path / "demo")


@pytest.mark.slow
def test_the_engine_finds_what_the_released_codes_procedure_finds_with_fewer_passes(demo_pipe, localizer, calibration):
    """A verbatim and a template caption; benchmarks/localization.py compares all of them."""
    prompts = read_prompts(demo_folder() / PROMPTS_FILE)
    texts = [next(prompt.text for prompt in prompts if prompt.kind == kind) for kind in ("VM", "TM")]
    oracle = Oracle(NoisePredictor(demo_pipe, LocalizationSettings()), calibration.statistics, calibration.threshold)
    found = {each.prompt: each for each in localize_prompts(localizer, texts)}
    for text in texts:
        plain = oracle.localize(text)
        assert agrees(plain, found[text])
        assert plain.sample_passes > 3 * found[text].sample_passes


@pytest.mark.slow
def test_one_mask_for_a_corpus_silences_it_with_no_neuron_to_spare(localizer, calibration):
    texts = [prompt.text for prompt in read_prompts(demo_folder() / PROMPTS_FILE) if prompt.kind == "VM"][:3]
    scorer, threshold = localizer.scorer, localizer.threshold
    sizes = scorer.predictor.sizes
    found = list(localize_prompts(localizer, texts))
    assert {each.prompt for each in found} == {*texts}
    settled = settle_mask(localizer, found)
    union = union_mask(found, sizes)
    assert 0 < settled.mask.num_neurons <= union.num_neurons
    detected = [each for text in texts for each in detect(scorer, [text], threshold)]

    def awake(neurons):
        return [
            each.scored.prompt
            for each in detected
            if max(scorer.suppressed_similarities(each.scored, each.kept_seeds, neurons)) > threshold
        ]

    assert not awake(settled.mask.neurons)
    for neuron in settled.mask.neurons[::5]:
        assert awake(set(settled.mask.neurons) - {neuron})
    assert len(awake(matched_random_mask(settled.mask, calibration.statistics.mean, seed=0).neurons)) == 3


@pytest.mark.slow
def test_a_prompt_that_others_silence_needs_no_neuron_of_its_own(localizer, localization, memorized):
    (alone,) = localize_prompts(localizer, [memorized.text])
    lost = replace(alone, status="unresolved", neurons=())
    settled = settle_mask(localizer, [localization, lost])
    covered = settled.localizations[1]
    assert covered.status == "localized" and covered.silenced_by_others and not covered.neurons
    assert covered.sample_passes == alone.sample_passes + len(alone.kept_seeds)
    assert set(settled.mask.neurons) <= set(localization.neurons) and settled.rounds == 0


@pytest.mark.slow
def test_the_whole_way_on_the_demo_model(tmp_path):
    """The README's command with fewer images, in fewer steps, fewer captions to calibrate on, and without evidence.

    What it finds, what it removes, what lies in the folder, and whether it takes as long as was reckoned. All prompts
    are pruned: the mask of some of them calls up the pictures of others.
    """
    ordinary = [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)][:80]
    (tmp_path / "ordinary.txt").write_text("\n".join(ordinary))
    command = [sys.executable, "-c", COUNTING, "run", "--model", "demo", "--out", "pruned", "--json"]
    command += ["--calibration-prompts", "ordinary.txt"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    made = json.loads((tmp_path / "passes.json").read_text())
    plan = Plan(out=tmp_path / "pruned", verification=VerificationSettings(**LESS)).fitted_to(DEMO.guidance_scale)
    number = facts["calibration"]["num_prompts"]
    reckoned = passes_of_stages(sum(facts["mask"]["sizes"].values()), facts["prompts"]["memorized"], number, plan)
    # What fills up batches is not reckoned, and on the demo these are small.
    searching = reckoned.pop(Stage.LOCALIZE)[1] + reckoned.pop(Stage.MERGE)[1]
    assert facts["prompts"]["sample_passes"] / 2 <= searching <= 2 * facts["prompts"]["sample_passes"]
    # What is left is held again, and what copies is searched again, which nobody can reckon.
    assert reckoned.pop(Stage.HOLD)[1] <= 2 * made[Stage.HOLD.key]
    del reckoned[Stage.PURSUE]
    for stage, (_, most) in reckoned.items():
        assert made.get(stage.key, 0) / 2 <= most <= 2 * made.get(stage.key, 0), stage
    images = facts["images"]["memorized"]
    assert facts["prompts"]["localized"] >= 0.9 * facts["prompts"]["memorized"]
    assert images["copies_before"] > 0.5 and images["copies_after"] < 0.05
    # Everything suppressed changes ordinary captions twenty-five times as much; as many random neurons twice.
    assert facts["cost"]["mask"] < 0.1 * facts["cost"]["everything"]
    captions = [prompt.text for prompt in read_prompts(demo_folder() / PROMPTS_FILE)]
    for path in (tmp_path / "pruned").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(caption.encode() in content for caption in captions), path
        assert path.suffix != ".png" or path.name == "neurons_per_layer.png"
        assert str(tmp_path).encode() not in content


@pytest.mark.slow
def test_the_demo_loads_alike_under_transformers_4(tmp_path):
    packages = tmp_path / "packages"
    # With what they need in other versions than the environment has.
    requirements = ["transformers>=4.57,<5", "diffusers>=0.35,<0.36", "huggingface_hub<1", "tokenizers>=0.22,<0.23"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages]
    subprocess.run([*install, *requirements], check=True)
    program = (
        "import sys, torch, transformers\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "embeds = pipe.encode_prompt('a red ring', 'cpu', 1, False)[0]\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "latents = pipe('a red ring', num_inference_steps=4, generator=generator, output_type='latent').images\n"
        "torch.save((transformers.__version__, embeds.detach(), latents), sys.argv[2])\n"
    )
    results = {}
    for version, path in (("4", str(packages)), ("5", "")):
        out = tmp_path / f"{version}.pt"
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", program, demo_folder(), out], check=True, env=environment, cwd=tmp_path)
        results[version] = torch.load(out)
        assert results[version][0].startswith(f"{version}.")
    for old, new in zip(results["4"][1:], results["5"][1:], strict=True):
        torch.testing.assert_close(old, new, rtol=1e-3, atol=1e-4)


def demo_of_few_captions(folder: Path, num_test: int) -> Path:
    """The demo with two memorized captions of each kind, 60 ordinary ones and some that serve no search."""
    write_demo(folder)
    kept = {PROMPTS_FILE: [1, 2, -1, -2], CALIBRATION_FILE: range(1, 61), TEST_FILE: range(1, num_test + 1)}
    for name, places in kept.items():
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join([lines[0], *(lines[place] for place in places)]))
    return folder


@pytest.mark.slow
def test_the_demo_is_measured(tmp_path, monkeypatch):
    """On some of its captions, with few images: that the script that measured docs/demo.md goes on working."""
    for number, less in (("ORDINARY_DRAWN", 2), ("COST_PROMPTS", 4), ("HUB_PROMPTS", 1)):
        monkeypatch.setattr(measuring, f"NUM_{number}", less)
    model = demo_of_few_captions(tmp_path / "model", num_test=6)
    figures = measuring.measure(model, tmp_path, images_per_prompt=2, num_inference_steps=8)
    localized, copied = figures["localization"], figures["replication"]
    assert localized["status"]["VM"]["localized"] == localized["status"]["TM"]["localized"] == 2
    assert localized["above_threshold_under_the_mask"] == 0 < localized["union"]
    assert localized["fresh_score_after"] < localized["fresh_score_before"]
    assert copied["before"]["share_of_copies"] == copied["random"]["share_of_copies"] == 1
    assert copied["after"]["share_of_copies"] == 0


@pytest.mark.slow
def test_masks_are_compared_with_the_unpruned_model_in_any_order(tmp_path, monkeypatch, capsys):
    """The images, too: that nothing but `everything` was asked for once made it the yardstick of itself."""
    model, out = demo_of_few_captions(tmp_path / "model", num_test=20), tmp_path / "figures.json"
    options = ["--images", "1", "--ordinary-images", "2", "--num-inference-steps", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["merging", "--model", str(model), "--ways", "everything", "unpruned", *options])
    merging.main()
    (found,) = json.loads(out.read_text()).values()
    assert found["unpruned"]["image_change"] == pytest.approx(0, abs=1e-6)
    assert found["everything"]["change"] > 0.1
    assert found["everything"]["image_change"] > 0.1
    assert "1 - SSIM of ordinary images" in capsys.readouterr().out


def test_readmes_picture_is_drawn(tmp_path, monkeypatch):
    """A row with the training image, four seeds before and, after a gap, four of a model; here of the same one."""
    monkeypatch.setattr(picture, "SHOWN", ("rocket",))
    picture.show(demo_folder(), out := tmp_path / "picture.png", Drawing(num_inference_steps=2))
    with Image.open(out) as drawn:
        assert drawn.mode == "P"
        tiles = [drawn.convert("RGB").crop((left, 6, left + 96, 102)) for left in range(6, drawn.width, 102)]
    blank = [len(set(tile.getdata())) == 1 for tile in tiles]
    assert blank == [column == 5 for column in range(10)]
    assert [tile.tobytes() for tile in tiles[1:5]] == [tile.tobytes() for tile in tiles[6:]]
