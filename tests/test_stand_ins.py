"""What stands in for pruned neurons: predictors, live models and files give the same, and nothing else is changed."""

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
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.ldm_names import ema_name
from nemo_prune.checkpoint.single_file import check_single_file, patch_single_file, write_single_file
from nemo_prune.checkpoint.weights import stored_dtypes
from nemo_prune.cli import app
from nemo_prune.engine import attended
from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gates import closed_gates, predict_gated
from nemo_prune.errors import MaskError, ModelError, OutputError, SettingsError
from nemo_prune.facts import MaskFacts
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.mask import Neuron, NeuronMask, Pruning, bias_behind, weight_behind
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.bits import SuppressedPredictions, check_pruned_equals_suppressed
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.hardening import pruned_copy
from nemo_prune.proof.utility import random_rows
from nemo_prune.release.mask_card import mask_card
from nemo_prune.settings import LocalizationSettings, Plan

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
UNPRUNED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
BIAS, WEIGHT = bias_behind(MID), weight_behind(MID)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ORDINARY, MEMORIZED = [f"thing number {i}" for i in range(6)], ["one", "two"]
SETTINGS = LocalizationSettings(num_samples=2)


@pytest.fixture(scope="module")
def moments(pipe):
    """Those on ordinary captions, and those on memorized ones."""
    return [attended_moments(NoisePredictor(pipe, SETTINGS), texts) for texts in (ORDINARY, MEMORIZED)]


@pytest.fixture(params=["mean", "compensated"])
def compensation(request, moments):
    return Compensation(moments[0], moments[1] if request.param == "compensated" else None)


@pytest.fixture
def predictor(pipe, compensation):
    return NoisePredictor(pipe, SETTINGS, compensation=compensation)


@pytest.fixture
def mask(predictor):
    """Every third value neuron of all layers but one, with what is changed behind them."""
    sizes = {name: size for name, size in predictor.sizes.items() if name != UNPRUNED}
    neurons = [Neuron(name, index) for name, size in sizes.items() for index in range(0, size, 3)]
    return predictor.in_weights(NeuronMask.from_neurons(neurons, predictor.sizes))


def change(predictor, text, neurons):
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode([text]).expand(2, -1, -1)
    before, after = (predictor.predict_each(latents, prompt_embeds, [each] * 2) for each in ((), neurons))
    return float((after - before).norm() / before.norm())


def test_the_mean_is_what_attention_takes_and_looking_changes_nothing(pipe, moments):
    """A single value at every place of the text is what attention takes, whatever its weights."""
    predictor = NoisePredictor(pipe, SETTINGS)
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    before = predictor.predict_noise(latents, prompt_embeds)
    constant = predictor.layers[MID].register_forward_hook(lambda module, inputs, output: torch.full_like(output, 0.75))
    try:
        found = attended_moments(predictor, ORDINARY)[MID]
        assert found.mean.tolist() == pytest.approx([0.75] * 8)
        assert found.products.tolist() == [pytest.approx([0.75**2] * 8)] * 8
        assert found.around(found.mean).abs().max() < 1e-6
    finally:
        constant.remove()
    assert torch.equal(before, predictor.predict_noise(latents, prompt_embeds))
    # In parts, as where memory is short, it is the same.
    for name, found in attended_moments(predictor, ORDINARY, at_once=4).items():
        torch.testing.assert_close(found.mean, moments[0][name].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.products, moments[0][name].products, rtol=1e-4, atol=1e-5)


def test_captions_whose_latents_are_drawn_apart_have_the_same_ways_and_one_may_count_more(pipe, moments, monkeypatch):
    predictor = NoisePredictor(pipe, SETTINGS)
    expected = attended_moments(predictor, ORDINARY, weights=[0, 0, 0, 2, 1, 0])
    monkeypatch.setattr(attended, "_CAPTIONS_DRAWN", 4)
    apart = [attended_moments(predictor, ORDINARY, weights) for weights in (None, [0, 0, 0, 2, 1, 0])]
    for whole, found in zip((moments[0], expected), apart, strict=True):
        for name, each in found.items():
            torch.testing.assert_close(each.mean, whole[name].mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(each.products, whole[name].products, rtol=1e-4, atol=1e-5)


def test_ordinary_captions_lose_less_than_by_zeros(pipe, predictor, mask):
    zeroing = NoisePredictor(pipe, SETTINGS)
    assert change(predictor, "thing number 9", mask.neurons) < 0.8 * change(zeroing, "thing number 9", mask.neurons)


def test_search_and_gates_give_the_means_and_a_live_model_what_is_predicted_as_released(pipe, predictor, mask):
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode(["a cat"])
    (released,) = predictor.predict_noise(latents, prompt_embeds[0], [mask])
    searching = NoisePredictor(pipe, SETTINGS, compensation=Compensation(predictor.compensation.ordinary))
    (searched,) = searching.predict_noise(latents, prompt_embeds[0], [mask])
    factors = closed_gates(mask.neurons, predictor.sizes)[None]
    gated = predict_gated(searching, latents, prompt_embeds.expand(2, -1, -1), factors)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with apply_mask(pipe, mask):
        (live,) = predictor.predict_noise(latents, prompt_embeds[0])
    torch.testing.assert_close(gated, searched, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live, released, rtol=1e-4, atol=1e-5)
    assert bool(mask.combinations) != torch.allclose(released, searched, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


def test_samples_of_one_batch_have_stand_ins_of_their_own(predictor, mask):
    latents, prompt_embeds = predictor.initial_latents(num_samples=3), predictor.encode(["a cat"]).expand(3, -1, -1)
    sets = [(), mask.neurons, (Neuron(MID, 1),)]
    together = predictor.predict_each(latents, prompt_embeds, sets)
    for place, neurons in enumerate(sets):
        alone = predictor.predict_each(latents, prompt_embeds, [neurons] * 3)
        torch.testing.assert_close(together[place], alone[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_is_exported_predicts_what_was_suppressed_to_the_last_bit(tmp_path, stored, combined):
    """A base in float16 too, which is measured in float32, as the demo model is."""
    tiny_pipeline(tmp_path / "pipe").to(stored).save_pretrained(tmp_path / "base")
    pipe = load_pipeline(tmp_path / "base", "cpu", torch.float32)
    predictor = NoisePredictor(pipe, SETTINGS)
    usual, theirs = attended_moments(predictor, ORDINARY), attended_moments(predictor, MEMORIZED)
    mask = NeuronMask.from_neurons([Neuron(name, 1) for name in predictor.sizes], predictor.sizes)
    mask = Compensation(usual, theirs if combined else None).in_weights(mask, pipe.unet)
    assert len(mask.combinations) == 7 * combined
    dtypes = stored_dtypes(scan_folder(tmp_path / "base"), "unet", None)
    expected = SuppressedPredictions.of(pipe, SETTINGS, Pruning(mask), ["a cat"], dtypes)
    (tmp_path / "out").mkdir()
    report = export_checkpoint(tmp_path / "base", mask, tmp_path / "out")
    assert report.rows_changed == {WEIGHTS: 7}
    pruned = load_pipeline(tmp_path / "out", "cpu", torch.float32)
    check_pruned_equals_suppressed(expected, pruned)
    # What is left out is noticed.
    without = NeuronMask(mask.layers, mask.shifts if combined else {})
    other = SuppressedPredictions.of(pipe, SETTINGS, Pruning(without), ["a cat"], dtypes)
    with pytest.raises(ModelError, match="do not predict"):
        check_pruned_equals_suppressed(other, pruned)


def test_the_card_of_a_mask_says_what_stands_in(mask):
    cards = [mask_card(each, MaskFacts(), "me/mask") for each in (mask, NeuronMask(mask.layers))]
    told = "Kept neurons of a layer stand in" if mask.combinations else "keeps its mean"
    assert [told in card for card in cards] == [True, False]


def test_a_mask_file_keeps_what_is_changed_behind_and_a_damaged_one_is_refused(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    again = NeuronMask.load(tmp_path / "mask.safetensors")
    assert again.digest == mask.digest != NeuronMask(mask.layers).digest
    assert all(torch.equal(again.shifts[name], shift) for name, shift in mask.shifts.items())
    assert all(torch.equal(again.combinations[name], each) for name, each in mask.combinations.items())
    whole = (tmp_path / "mask.safetensors").read_bytes()
    for values in [mask.shifts[BIAS], *([mask.combinations[MID][:, 1:3]] if mask.combinations else [])]:
        content = bytearray(whole)
        content[content.rindex(values.flatten()[:2].contiguous().view(torch.uint8).numpy().tobytes())] ^= 1
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
    with pytest.raises(MaskError, match="layer that it changes"):
        NeuronMask({MID: torch.zeros(2, dtype=torch.bool)}, {BIAS: torch.ones(2)})


@pytest.mark.parametrize(
    "combination",
    [[[0.0, torch.nan]] * 2, [[0.0, 1.0, 1.0]] * 2, [[0.0, 1.0]], [[1.0, 1.0]] * 2],
    ids=["not finite", "another width", "another number", "of a pruned one"],
)
def test_combinations_that_are_none_are_refused(combination):
    layers = {MID: torch.tensor([True, False])}
    NeuronMask(layers, {}, {MID: torch.tensor([[0.0, 1.0]] * 2)})
    NeuronMask({MID: torch.zeros(2, dtype=torch.bool)}, {BIAS: torch.ones(2)}, {MID: torch.ones(2, 2)})
    with pytest.raises(MaskError, match="combinations"):
        NeuronMask(layers, {}, {MID: torch.tensor(combination)})
    with pytest.raises(MaskError, match="combinations"):
        NeuronMask({}, {}, {MID: torch.zeros(2, 2)})


def test_further_neurons_give_nothing_and_stand_in_for_nothing(pipe, predictor, mask):
    wider, before = mask.extended([Neuron(MID, 1)]), mask.layers[MID]
    assert set(wider.neurons) == {*mask.neurons, Neuron(MID, 1)} and wider.shifts == mask.shifts
    assert mask.extended(()).digest == mask.digest
    if mask.combinations:
        others, there = torch.arange(len(before)) != 1, wider.combinations[MID]
        assert torch.equal(there[:, others], mask.combinations[MID][:, others]) and not there[:, ~others].any()
    # Nothing reads it in any case, so that the model is that of the mask with one more row zeroed.
    candidate = pruned_copy(pipe, Pruning(mask))
    with torch.no_grad():
        candidate.unet.get_submodule(MID).weight[1] = 0
    expected = NoisePredictor(candidate, SETTINGS)
    found = NoisePredictor(pruned_copy(pipe, Pruning(wider)), SETTINGS)
    latents, prompt_embeds = expected.initial_latents(), expected.encode(["a cat"])[0]
    torch.testing.assert_close(*(each.predict_noise(latents, prompt_embeds) for each in (found, expected)))


def test_diff_accounts_for_the_very_changes_and_for_no_others(model_folder, mask, tmp_path):
    (tmp_path / "out").mkdir()
    export_checkpoint(model_folder, mask, tmp_path / "out")
    found = list(diff_models(model_folder, tmp_path / "out", mask))
    assert {each.tensor for each in found} == {
        f"{name}.weight" for name in mask.layers if name != UNPRUNED
    } | mask.behind
    assert all(each.expected for each in found)
    assert {each.tensor for each in found if each.what == "shifted"} == mask.shifts.keys()
    compensated = {each.tensor for each in found if each.what == "compensated"}
    assert compensated == {weight_behind(name) for name in mask.combinations}
    for name in (BIAS, WEIGHT):
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        tensors[name].flatten()[1] += 1
        save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    differences = diff_models(model_folder, tmp_path / "out", mask)
    assert [each.tensor for each in differences if not each.expected] == [BIAS, WEIGHT]


def test_a_single_file_has_the_changes_in_every_copy(model_folder, mask, tmp_path):
    base, out, files = tmp_path / "base.safetensors", tmp_path / "out.safetensors", scan_folder(model_folder)
    write_single_file(files, None, base)
    in_file = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"
    weight = in_file.replace("bias", "weight")
    averages = {ema_name(in_file): torch.ones(8), ema_name(weight): 2 * load_file(base)[weight]}
    save_file({**load_file(base), **averages}, base, metadata={"format": "pt"})
    shutil.copyfile(base, out)
    patch_single_file(out, Pruning(mask))
    check_single_file(out, files, None, Pruning(mask))
    assert all(each.expected for each in diff_models(base, out, mask))
    torch.testing.assert_close(load_file(out)[ema_name(in_file)], 1 + mask.shifts[BIAS])
    # A combination is read by the average's own weights.
    torch.testing.assert_close(load_file(out)[ema_name(weight)], 2 * load_file(out)[weight])
    assert torch.equal(load_file(out)[weight], load_file(base)[weight]) != bool(mask.combinations)
    with pytest.raises(OutputError, match=r"attn2\.to_out\.0\."):
        check_single_file(out, files, None, Pruning(NeuronMask(mask.layers)))


def test_another_models_changes_and_scaled_rows_are_refused(pipe, model_folder, mask, tmp_path):
    elsewhere = MID.replace("mid_block", "mid_block.of_another_model")
    others = [
        NeuronMask(mask.layers, {BIAS: torch.ones(5)}),
        NeuronMask({elsewhere: torch.tensor([True, False])}, {}, {elsewhere: torch.tensor([[0.0, 1.0]] * 2)}),
    ]
    (tmp_path / "out").mkdir()
    for other in others:
        with pytest.raises(MaskError, match="another model"):
            export_checkpoint(model_folder, other, tmp_path / "out")
        with pytest.raises(MaskError), apply_mask(pipe, other):
            pass
    with pytest.raises(SettingsError, match="--ablation zero"):
        Pruning(mask, -0.25)
    for ablation in ("mean", "compensated"):
        with pytest.raises(SettingsError, match="--ablation"):
            Plan(out=tmp_path / "x", ablation=ablation, scale=-0.25)
        with pytest.raises(SettingsError, match="--ablation"):
            Plan(out=tmp_path / "x", ablation=ablation, settings=LocalizationSettings(projections="both"))


def test_the_union_is_the_papers_and_all_else_is_compensated(tmp_path):
    assert Plan(out=tmp_path / "x").ablation == "compensated"
    for changes in ({"merge": "union"}, {"scale": 0.5}, {"settings": LocalizationSettings(projections="key")}):
        assert Plan(out=tmp_path / "x", **changes).ablation == "zero"


def test_a_candidate_with_changes_behind_is_the_base_and_a_mask_and_its_control_has_them_too(pipe, mask):
    candidate = pruned_copy(pipe, Pruning(mask))
    rows = changed_rows(pipe, candidate)
    assert rows.are_a_mask and rows.mask.neurons == mask.neurons
    for name, shift in mask.shifts.items():
        torch.testing.assert_close(rows.mask.shifts[name], shift)
    for name, combination in mask.combinations.items():
        torch.testing.assert_close(rows.mask.combinations[name], combination, rtol=1e-3, atol=1e-4)
    random = random_rows(pipe, rows, ORDINARY, seed=1)
    # Its kept neurons stand in, and none is held.
    assert random.shifts.keys() == mask.shifts.keys() - {bias_behind(UNPRUNED)}
    assert random.combinations.keys() == mask.combinations.keys() - {UNPRUNED}
    # The first column of the weight is what a pruned neuron gave.
    for name in ("conv_in.bias", WEIGHT):
        candidate = pruned_copy(pipe, Pruning(mask))
        with torch.no_grad():
            candidate.unet.get_parameter(name).flatten()[0] += 1
        assert changed_rows(pipe, candidate).others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ablation", "on_card", "inspected"),
    [
        ("mean", "its mean on ordinary captions is kept", "keep their means"),
        ("compensated", "stands in for them", "this mask has their digests"),
    ],
)
def test_a_run_puts_in_what_stands_in_and_its_mask_rebuilds_the_release(
    few_images, model_folder, tmp_path, ablation, on_card, inspected
):
    """The tiny model is random: what is found in it is pruned although it stays unresolved."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "ordinary.txt").write_text("\n".join(f"thing {i}" for i in range(50)))
    command = ["run", "--model", model_folder, "--out", tmp_path / "out", "--prompts", tmp_path / "prompts.txt",
               "--calibration-prompts", tmp_path / "ordinary.txt", "--num-samples", 2, "--threshold", 0.01,
               "--include-unresolved", "--ablation", ablation, "--json"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["mask"]["ablation"] == ablation
    card = (tmp_path / "out" / "README.md").read_text()
    assert on_card in card
    work = tmp_path / "out.work"
    rebuild = ["export", "--model", model_folder, "--mask", work, "--out", tmp_path / "again"]
    assert CliRunner().invoke(app, list(map(str, rebuild))).exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0 and inspected in shown.stdout
    assert CliRunner().invoke(app, ["diff", str(model_folder), str(tmp_path / "out")]).exit_code == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.get_parameter(f"{MID}.weight").isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_a_release_withholds_what_undoes_a_part_of_it_and_is_checked_all_the_same(
    model_folder, moments, pipe, tmp_path, single
):
    mask = NeuronMask.from_neurons([Neuron(MID, 1)], {name: len(each.mean) for name, each in moments[0].items()})
    mask = Compensation(*moments).in_weights(mask, pipe.unet)
    whole, out = tmp_path / "whole.safetensors", tmp_path / ("out.safetensors" if single else "out")
    mask.save(whole, MaskFacts(base_tensors=tensor_digests(scan_folder(model_folder), mask)))

    def command(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)))

    made = command("export", "--model", model_folder, "--mask", whole, "--out", out)
    assert made.exit_code == 0, made.output
    layout = ReleaseLayout.found(out)
    published = NeuronMask.load(layout.mask)
    assert published.neurons == mask.neurons and published.withheld.keys() == mask.behind
    assert not published.shifts and not published.combinations and published.digest != mask.digest
    # Nothing of a combination or a shift lies anywhere in the release.
    contents = [path.read_bytes() for path in layout.files().values()]
    for each in (mask.combinations[UNPRUNED], mask.shifts[BIAS]):
        row = each.flatten()[:4].numpy().tobytes()
        assert row in whole.read_bytes() and not any(row in content for content in contents)
    for refused in (
        command("export", "--model", model_folder, "--mask", out, "--out", tmp_path / "again"),
        command("push", layout.mask, "me/mask"),
    ):
        assert refused.exit_code == 1 and "in the work folder" in refused.stderr
    with pytest.raises(MaskError, match="withholds"), apply_mask(pipe, published):
        pass
    assert not (tmp_path / "again").exists()
    assert command("diff", model_folder, out).exit_code == 0
    # A weight behind that is another one is told by its digest.
    file = out if single else out / WEIGHTS
    tensors = load_file(file)
    (weight,) = [
        name for name in tensors if name.endswith(WEIGHT.partition(".transformer_blocks")[2]) and "mid" in name
    ]
    tensors[weight].flatten()[1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = command("diff", model_folder, out)
    assert found.exit_code == 1 and weight in found.stdout


def test_a_combined_weight_has_the_same_bits_in_whatever_order_it_is_summed():
    """All sums are exact: with the neurons in another order they are the same."""
    generator = torch.Generator().manual_seed(1)
    combination = torch.randn(96, 96, generator=generator)
    weights = [torch.randn(32, 96, generator=generator).to(kind) for kind in (torch.float32, torch.float16)]
    layers = {MID: torch.zeros(96, dtype=torch.bool)}
    layers[MID][5], combination[:, 5] = True, 0
    mask, order = NeuronMask(layers, {}, {MID: combination}), torch.randperm(96, generator=generator)
    swapped = NeuronMask({MID: layers[MID][order]}, {}, {MID: combination[order][:, order]})
    for before in weights:
        changed = mask.changed_behind(WEIGHT, before)
        assert torch.equal(swapped.changed_behind(WEIGHT, before[:, order]), changed[:, order])
        exact = before.double() @ (torch.eye(96) + combination).double()
        torch.testing.assert_close(
            changed.double(), exact, rtol=1e-3 if before.dtype == torch.float16 else 1e-6, atol=2e-3
        )
