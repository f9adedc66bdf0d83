"""The yardstick of kept neurons that take over what pruned ones give."""

import pytest
import torch

from benchmarks import compensation
from benchmarks.closed_form import replaced_weights
from benchmarks.compensation import attended_moments, compensated_weights
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.means import attended_means, keeping_means
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.settings import LocalizationSettings

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
ORDINARY, MEMORIZED = ["a cat", "a dog", "a red house"], ["one", "two"]


@pytest.fixture
def predictor(pipe):
    return NoisePredictor(pipe, LocalizationSettings(num_samples=2))


def test_where_kept_neurons_tell_nothing_the_mean_is_left(predictor, monkeypatch):
    monkeypatch.setattr(compensation, "RIDGE", 1e12)
    mask = NeuronMask.from_neurons([Neuron(MID, index) for index in (0, 3)], predictor.sizes)
    weights = compensated_weights(predictor, mask, MEMORIZED, ORDINARY)
    predictor.means = attended_means(predictor, ORDINARY)
    ((bias, shift),) = keeping_means(mask, predictor).shifts.items()
    parameters = dict(predictor.pipe.unet.named_parameters())
    torch.testing.assert_close(weights[bias], parameters[bias] + shift)
    behind = bias.replace("bias", "weight")
    torch.testing.assert_close(weights[behind], parameters[behind])
    assert weights.keys() == {f"{MID}.weight", bias, behind} and not weights[f"{MID}.weight"][[0, 3]].any()


def test_a_neuron_that_another_one_repeats_is_taken_over_whole(predictor, monkeypatch):
    monkeypatch.setattr(compensation, "RIDGE", 1e-9)
    monkeypatch.setattr(compensation, "MEMORIZED", 0.0)
    layer = predictor.layers[MID]
    repeated = layer.weight.detach().clone()
    # Of the same head.
    repeated[1] = 2 * repeated[0]
    with replaced_weights(predictor, {f"{MID}.weight": repeated}):
        before = predictor.predict_noise(predictor.initial_latents(), predictor.encode(["a fish"])[0])
        mask = NeuronMask.from_neurons([Neuron(MID, 1)], predictor.sizes)
        with replaced_weights(predictor, compensated_weights(predictor, mask, MEMORIZED, ORDINARY)):
            after = predictor.predict_noise(predictor.initial_latents(), predictor.encode(["a fish"])[0])
        with replaced_weights(predictor, {f"{MID}.weight": repeated * (torch.arange(len(repeated)) != 1)[:, None]}):
            zeroed = predictor.predict_noise(predictor.initial_latents(), predictor.encode(["a fish"])[0])
    assert (after - before).norm() < 1e-3 * (zeroed - before).norm()


def test_what_they_tell_of_memorized_captions_is_held_down(predictor, monkeypatch):
    mask = NeuronMask.from_neurons([Neuron(MID, index) for index in (0, 3)], predictor.sizes)
    theirs, sizes = attended_moments(predictor, MEMORIZED)[MID], []
    mean, kept = attended_moments(predictor, ORDINARY)[MID].mean, ~mask.layers[MID]
    around = theirs.around(mean)[kept][:, kept]
    for weight in (0.0, 10.0):
        monkeypatch.setattr(compensation, "MEMORIZED", weight)
        behind = f"{MID.replace('to_v', 'to_out.0')}.weight"
        moved = compensated_weights(predictor, mask, MEMORIZED, ORDINARY)[behind].double()
        moved = (moved - dict(predictor.pipe.unet.named_parameters())[behind].detach().double())[:, kept]
        sizes.append(float((moved @ around @ moved.T).trace()))
    assert 0 < sizes[1] < sizes[0]
