"""Neurons that keep their mean: the search, the live model and the files give the same, and nothing else is shifted."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import tiny_pipeline
from nemo_prune.checkpoint.diff import diff_models
from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.ldm_names import ema_name
from nemo_prune.checkpoint.single_file import check_single_file, patch_single_file, write_single_file
from nemo_prune.checkpoint.weights import stored_dtypes
from nemo_prune.cli import app
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gates import closed_gates, predict_gated
from nemo_prune.engine.means import attended_means, keeping_means
from nemo_prune.errors import MaskError, ModelError, OutputError, SettingsError
from nemo_prune.facts import MaskFacts
from nemo_prune.mask import Neuron, NeuronMask, Pruning, bias_behind
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.bits import SuppressedPredictions, check_pruned_equals_suppressed
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.hardening import pruned_copy
from nemo_prune.proof.utility import random_rows
from nemo_prune.release.mask_card import mask_card
from nemo_prune.settings import LocalizationSettings, Plan

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
BIAS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ORDINARY = [f"thing number {i}" for i in range(6)]
SETTINGS = LocalizationSettings(num_samples=2)


@pytest.fixture(scope="module")
def means(pipe):
    return attended_means(NoisePredictor(pipe, SETTINGS), ORDINARY)


@pytest.fixture
def predictor(pipe, means):
    found = NoisePredictor(pipe, SETTINGS)
    found.means = means
    return found


@pytest.fixture
def mask(predictor):
    """Every third value neuron, with the shifts."""
    neurons = [Neuron(name, index) for name, size in predictor.sizes.items() for index in range(0, size, 3)]
    return keeping_means(NeuronMask.from_neurons(neurons, predictor.sizes), predictor)


def change(predictor, text, neurons):
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode([text]).expand(2, -1, -1)
    before, after = (predictor.predict_each(latents, prompt_embeds, [each] * 2) for each in ((), neurons))
    return float((after - before).norm() / before.norm())


def test_the_mean_is_what_attention_takes_and_looking_changes_nothing(pipe, means):
    """A single value at every place of the text is what attention takes, whatever its weights."""
    predictor = NoisePredictor(pipe, SETTINGS)
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    before = predictor.predict_noise(latents, prompt_embeds)
    constant = predictor.layers[MID].register_forward_hook(lambda module, inputs, output: torch.full_like(output, 0.75))
    try:
        assert attended_means(predictor, ORDINARY)[MID].tolist() == pytest.approx([0.75] * 8)
    finally:
        constant.remove()
    assert torch.equal(before, predictor.predict_noise(latents, prompt_embeds))
    # In parts, as where memory is short, it is the same.
    for name, values in attended_means(predictor, ORDINARY, at_once=4).items():
        assert values.tolist() == pytest.approx(means[name].tolist(), abs=1e-5)


def test_ordinary_captions_lose_less_than_by_zeros(pipe, predictor, mask):
    zeroing = NoisePredictor(pipe, SETTINGS)
    assert change(predictor, "thing number 9", mask.neurons) < 0.8 * change(zeroing, "thing number 9", mask.neurons)


def test_search_gates_and_live_model_give_the_same(pipe, predictor, mask):
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode(["a cat"])
    (searched,) = predictor.predict_noise(latents, prompt_embeds[0], [mask])
    factors = closed_gates(mask.neurons, predictor.sizes)[None]
    gated = predict_gated(predictor, latents, prompt_embeds.expand(2, -1, -1), factors)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with apply_mask(pipe, mask):
        (live,) = predictor.predict_noise(latents, prompt_embeds[0])
    for found in (gated, live):
        torch.testing.assert_close(found, searched, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_is_exported_predicts_what_was_suppressed_to_the_last_bit(tmp_path, stored):
    """A base in float16 too, which is measured in float32, as the demo model is."""
    tiny_pipeline(tmp_path / "pipe").to(stored).save_pretrained(tmp_path / "base")
    pipe = load_pipeline(tmp_path / "base", "cpu", torch.float32)
    predictor = NoisePredictor(pipe, SETTINGS)
    predictor.means = attended_means(predictor, ORDINARY)
    neurons = [Neuron(name, 1) for name in predictor.sizes]
    mask = NeuronMask.from_neurons(neurons, predictor.sizes)
    mask = keeping_means(mask, predictor, stored_dtypes(scan_folder(tmp_path / "base"), "unet", None))
    expected = SuppressedPredictions.of(pipe, SETTINGS, Pruning(mask), ["a cat"])
    (tmp_path / "out").mkdir()
    report = export_checkpoint(tmp_path / "base", mask, tmp_path / "out")
    assert report.rows_changed == {WEIGHTS: 7}
    pruned = load_pipeline(tmp_path / "out", "cpu", torch.float32)
    check_pruned_equals_suppressed(expected, pruned)
    # A shift that is left out is noticed.
    zeroed = SuppressedPredictions.of(pipe, SETTINGS, Pruning(NeuronMask(mask.layers)), ["a cat"])
    with pytest.raises(ModelError, match="do not predict"):
        check_pruned_equals_suppressed(zeroed, pruned)


def test_the_card_of_a_mask_says_that_means_are_kept(mask):
    cards = [mask_card(each, MaskFacts(), "me/mask") for each in (mask, NeuronMask(mask.layers))]
    assert ["keeps its mean" in card for card in cards] == [True, False]


def test_a_mask_file_keeps_the_shifts_and_a_damaged_one_is_refused(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    again = NeuronMask.load(tmp_path / "mask.safetensors")
    assert again.digest == mask.digest != NeuronMask(mask.layers).digest
    assert all(torch.equal(again.shifts[name], shift) for name, shift in mask.shifts.items())
    content = bytearray((tmp_path / "mask.safetensors").read_bytes())
    place = content.rindex(bytes(mask.shifts[BIAS][:2].view(torch.uint8).tolist()))
    content[place] ^= 1
    (tmp_path / "mask.safetensors").write_bytes(content)
    with pytest.raises(MaskError, match="damaged"):
        NeuronMask.load(tmp_path / "mask.safetensors")


@pytest.mark.parametrize(
    "shift", [torch.tensor([1.0, torch.nan]), torch.ones(2, 2), torch.ones(2, dtype=torch.float64)]
)
def test_shifts_that_are_none_are_refused(shift):
    layers = {MID: torch.tensor([True, False])}
    with pytest.raises(MaskError, match="shift"):
        NeuronMask(layers, {BIAS: shift})
    with pytest.raises(MaskError, match="pruned layer"):
        NeuronMask({MID: torch.zeros(2, dtype=torch.bool)}, {BIAS: torch.ones(2)})


def test_diff_accounts_for_the_very_shift_and_for_no_other(model_folder, mask, tmp_path):
    (tmp_path / "out").mkdir()
    export_checkpoint(model_folder, mask, tmp_path / "out")
    found = list(diff_models(model_folder, tmp_path / "out", mask))
    assert {each.tensor for each in found} == mask.tensor_rows.keys() - {f"{n}.bias" for n in mask.layers} | {
        bias_behind(name) for name in mask.layers
    }
    assert all(each.expected for each in found)
    assert {each.tensor for each in found if each.what == "shifted"} == mask.shifts.keys()
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[BIAS][0] += 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    assert [each.tensor for each in diff_models(model_folder, tmp_path / "out", mask) if not each.expected] == [BIAS]


def test_a_single_file_has_the_shifts_in_every_copy(model_folder, mask, tmp_path):
    base, out, files = tmp_path / "base.safetensors", tmp_path / "out.safetensors", scan_folder(model_folder)
    write_single_file(files, None, base)
    in_file = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"
    save_file({**load_file(base), ema_name(in_file): torch.ones(8)}, base, metadata={"format": "pt"})
    shutil.copyfile(base, out)
    patch_single_file(out, Pruning(mask))
    check_single_file(out, files, None, Pruning(mask))
    assert all(each.expected for each in diff_models(base, out, mask))
    torch.testing.assert_close(load_file(out)[ema_name(in_file)], 1 + mask.shifts[BIAS])
    with pytest.raises(OutputError, match=r"attn2\.to_out\.0\.bias"):
        check_single_file(out, files, None, Pruning(NeuronMask(mask.layers)))


def test_another_models_shift_and_scaled_rows_are_refused(model_folder, mask, tmp_path):
    other = NeuronMask(mask.layers, {BIAS: torch.ones(5)})
    (tmp_path / "out").mkdir()
    with pytest.raises(MaskError, match="another model"):
        export_checkpoint(model_folder, other, tmp_path / "out")
    with pytest.raises(SettingsError, match="--ablation zero"):
        Pruning(mask, -0.25)
    with pytest.raises(SettingsError, match="--ablation"):
        Plan(out=tmp_path / "x", ablation="mean", scale=-0.25)
    with pytest.raises(SettingsError, match="--ablation"):
        Plan(out=tmp_path / "x", ablation="mean", settings=LocalizationSettings(projections="both"))


def test_the_union_is_the_papers_and_all_else_keeps_means(tmp_path):
    assert Plan(out=tmp_path / "x").ablation == "mean"
    for changes in ({"merge": "union"}, {"scale": 0.5}, {"settings": LocalizationSettings(projections="key")}):
        assert Plan(out=tmp_path / "x", **changes).ablation == "zero"


def test_a_candidate_with_shifts_is_the_base_and_a_mask_and_its_control_keeps_means_too(pipe, mask):
    candidate = pruned_copy(pipe, Pruning(mask))
    rows = changed_rows(pipe, candidate)
    assert rows.are_a_mask and rows.mask.neurons == mask.neurons
    for name, shift in mask.shifts.items():
        torch.testing.assert_close(rows.mask.shifts[name], shift)
    assert random_rows(pipe, rows, ORDINARY, seed=1).shifts.keys() == mask.shifts.keys()
    with torch.no_grad():
        candidate.unet.conv_in.bias += 1
    assert changed_rows(pipe, candidate).others


@pytest.mark.slow
def test_a_run_keeps_means_and_its_mask_rebuilds_the_release(few_images, model_folder, tmp_path):
    """The tiny model is random: what is found in it is pruned although it stays unresolved."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "ordinary.txt").write_text("\n".join(f"thing {i}" for i in range(50)))
    command = ["run", "--model", model_folder, "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt",
               "--calibration-prompts", tmp_path / "ordinary.txt", "--num-samples", 2, "--threshold", 0.01,
               "--include-unresolved", "--ablation", "mean", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["mask"]["ablation"] == "mean"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its mean on ordinary captions is kept" in card
    rebuild = ["export", "--model", model_folder, "--mask", tmp_path / "out", "--out", tmp_path / "again"]
    assert CliRunner().invoke(app, list(map(str, rebuild))).exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "keep their means" in shown.stdout
    assert CliRunner().invoke(app, ["diff", str(model_folder), str(tmp_path / "out")]).exit_code == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.get_parameter(f"{MID}.weight").isfinite().all()
