"""Kept neurons that stand in for pruned ones: as far as they can on ordinary captions, and not on memorized ones."""

import pytest
import torch

from benchmarks.closed_form import replaced_weights
from nemo_prune.engine import compensation
from nemo_prune.engine.attended import as_tensors, attended_moments, from_tensors
from nemo_prune.engine.compensation import Compensation, Moments
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.mask import Neuron, NeuronMask, bias_behind, weight_behind
from nemo_prune.settings import LocalizationSettings

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
ORDINARY, MEMORIZED = ["a cat", "a dog", "a red house"], ["one", "two"]


@pytest.fixture
def predictor(pipe):
    return NoisePredictor(pipe, LocalizationSettings(num_samples=2))


@pytest.fixture
def mask(predictor):
    return NeuronMask.from_neurons([Neuron(MID, index) for index in (0, 3)], predictor.sizes)


def test_where_kept_neurons_tell_nothing_the_mean_is_left(predictor, mask, monkeypatch):
    usual, theirs = (attended_moments(predictor, texts) for texts in (ORDINARY, MEMORIZED))
    means = Compensation(usual).in_weights(mask, predictor.pipe.unet)
    behind = predictor.pipe.unet.get_submodule(MID.replace("to_v", "to_out.0")).weight
    pruned = mask.layers[MID]
    expected = behind[:, pruned] @ usual[MID].mean[pruned]
    torch.testing.assert_close(*means.shifts.values(), expected.detach())
    assert not means.combinations
    monkeypatch.setattr(compensation, "RIDGE", 1e12)
    told = Compensation(usual, theirs).in_weights(mask, predictor.pipe.unet)
    torch.testing.assert_close(told.shifts[bias_behind(MID)], expected.detach())
    assert max(each.abs().max() for each in told.combinations.values()) < 1e-9
    # Where nothing is kept, there is nothing that could tell.
    everything = NeuronMask.from_neurons([Neuron(MID, i) for i in range(len(pruned))], predictor.sizes)
    assert MID not in Compensation(usual, theirs).in_weights(everything, predictor.pipe.unet).combinations


def test_layers_without_a_pruned_neuron_are_held_too_and_without_memorized_captions_are_not(predictor, mask):
    usual, theirs = (attended_moments(predictor, texts) for texts in (ORDINARY, MEMORIZED))
    held = Compensation(usual, theirs).in_weights(mask, predictor.pipe.unet)
    assert held.combinations.keys() == predictor.sizes.keys() and held.counts == mask.counts
    for control in (Compensation(usual, {}), Compensation(usual)):
        assert set(control.in_weights(mask, predictor.pipe.unet).behind) <= {bias_behind(MID), weight_behind(MID)}
    # Where nothing is pruned nothing is changed.
    nothing = NeuronMask.from_neurons((), predictor.sizes)
    assert not Compensation(usual, theirs).in_weights(nothing, predictor.pipe.unet).behind


def test_a_neuron_that_another_one_repeats_is_stood_in_for_whole(predictor, monkeypatch):
    monkeypatch.setattr(compensation, "RIDGE", 1e-6)
    repeated = predictor.layers[MID].weight.detach().clone()
    # Of the same head.
    repeated[1] = 2 * repeated[0]
    latents, prompt_embeds = predictor.initial_latents(), predictor.encode(["a fish"])[0]
    with replaced_weights(predictor, {f"{MID}.weight": repeated}):
        usual = attended_moments(predictor, ORDINARY)
        mask = NeuronMask.from_neurons([Neuron(MID, 1)], predictor.sizes)
        before = predictor.predict_noise(latents, prompt_embeds)
        with apply_mask(predictor.pipe, Compensation(usual, {}).in_weights(mask, predictor.pipe.unet)):
            after = predictor.predict_noise(latents, prompt_embeds)
        with apply_mask(predictor.pipe, mask):
            zeroed = predictor.predict_noise(latents, prompt_embeds)
    assert (after - before).norm() < 1e-2 * (zeroed - before).norm()


@pytest.mark.parametrize("held_more", ["STANDING_IN", "GIVEN", "hold"])
def test_what_they_tell_of_memorized_captions_is_held_down(predictor, mask, monkeypatch, held_more):
    usual, theirs = (attended_moments(predictor, texts) for texts in (ORDINARY, MEMORIZED))
    around, sizes = theirs[MID].around(usual[MID].mean).float(), []
    pruned = mask.layers[MID]
    asked = pruned if held_more == "STANDING_IN" else ~pruned
    for weight in (0.0, 0.5, 5.0):
        if held_more != "hold":
            monkeypatch.setattr(compensation, held_more, weight)
        hold = weight if held_more == "hold" else 1.0
        combination, constant = Compensation(usual, theirs, hold).taken(MID, pruned)
        assert not combination[:, pruned].any()
        # On the mean of ordinary captions everything gives its mean.
        given = combination.double() @ usual[MID].mean.double() + constant
        torch.testing.assert_close(given, torch.where(pruned, usual[MID].mean, 0.0).double())
        reads = (combination + torch.diag((~pruned).float()))[asked]
        sizes.append(float((reads @ around @ reads.T).trace()))
    assert 0 < sizes[2] < sizes[1] < sizes[0]


def test_with_nothing_held_kept_neurons_give_what_they_gave(predictor, mask):
    usual = attended_moments(predictor, ORDINARY)
    combination, constant = Compensation(usual, {}).taken(MID, mask.layers[MID])
    kept = ~mask.layers[MID]
    assert combination[~kept].any() and not combination[kept].any() and not constant[kept].any()


def test_a_layer_in_which_nothing_varies_keeps_its_means(predictor, mask):
    usual = attended_moments(predictor, ORDINARY)
    mean = usual[MID].mean
    constant = {MID: Moments(mean, torch.outer(mean.double(), mean.double()))}
    combination, given = Compensation(constant, constant).taken(MID, mask.layers[MID])
    pruned = mask.layers[MID]
    assert combination.abs().max() < 1e-6
    torch.testing.assert_close(given.float(), torch.where(pruned, mean, 0.0), rtol=1e-5, atol=1e-5)


def test_captions_count_by_their_weights(predictor, mask):
    first, second, both = (attended_moments(predictor, MEMORIZED, weights) for weights in ([1, 0], [0, 2], [1, 3]))
    for name, found in both.items():
        torch.testing.assert_close(found.mean, first[name].mean / 4 + second[name].mean * 3 / 4)
        torch.testing.assert_close(found.products, first[name].products / 4 + second[name].products * 3 / 4)
        mixed = first[name].mixed_with(second[name], 3 / 4)
        torch.testing.assert_close((mixed.mean, mixed.products), (found.mean, found.products))


def test_moments_are_kept_in_a_file_as_tensors(predictor):
    usual = attended_moments(predictor, ORDINARY)
    again = from_tensors(as_tensors(usual))
    assert again.keys() == usual.keys()
    assert all(torch.equal(again[name].products, each.products) for name, each in usual.items())
    assert all(torch.equal(again[name].mean, each.mean) for name, each in usual.items())
