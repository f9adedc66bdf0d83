"""Gates that can be differentiated: they are suppression at 0, nothing at 1, and leave no trace."""

import pytest
import torch

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import (
    BACKWARD_PASSES,
    all_neurons,
    closed_gates,
    draw_closings,
    frozen_weights,
    predict_gated,
    scaled,
    settled_closings,
    split_by_layer,
    touched_probabilities,
)
from nemo_prune.engine.similarity import noise_difference, similarity
from nemo_prune.engine.soft_similarity import soft_noise_difference, soft_similarity
from nemo_prune.settings import LocalizationSettings

BETAS = (0.33, 0.33, 0.33)


@pytest.fixture
def predictor(pipe):
    return NoisePredictor(pipe, LocalizationSettings(num_samples=3))


def test_a_closed_gate_is_a_suppressed_neuron_and_an_open_one_does_nothing(predictor):
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"] * 3)
    neurons = all_neurons(predictor.sizes)[::3]
    suppressed = predictor.predict_each(latents, embeds, [neurons] * 3)
    with torch.no_grad():
        gated = predict_gated(predictor, latents, embeds, closed_gates(neurons, predictor.sizes)[None])
        opened = predict_gated(predictor, latents, embeds, closed_gates([], predictor.sizes)[None])
    untouched = predictor.predict_each(latents, embeds, [()] * 3)
    torch.testing.assert_close(gated, suppressed)
    torch.testing.assert_close(opened, untouched)
    assert not torch.allclose(gated, opened, rtol=0, atol=1e-6)


def test_a_gradient_says_what_a_small_closing_does(predictor):
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"] * 3)
    factors = torch.full((1, sum(predictor.sizes.values())), 0.7, requires_grad=True)
    with frozen_weights(predictor):
        predict_gated(predictor, latents, embeds, factors)[0].sum().backward()
        gradient = factors.grad[0]
        neuron = int(gradient.abs().argmax())
        values = []
        for step in (-1e-2, 1e-2):
            moved = factors.detach().clone()
            moved[0, neuron] += step
            with torch.no_grad():
                values.append(float(predict_gated(predictor, latents, embeds, moved)[0].double().sum()))
    assert (values[1] - values[0]) / 2e-2 == pytest.approx(float(gradient[neuron]), rel=0.05)
    assert all(parameter.grad is None for parameter in predictor.pipe.unet.parameters())


def test_passes_are_counted_with_a_backward_as_two(predictor):
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"] * 3)
    factors = closed_gates([], predictor.sizes)[None]
    with torch.no_grad():
        predict_gated(predictor, latents, embeds, factors)
    assert predictor.sample_passes == 3
    with frozen_weights(predictor):
        predict_gated(predictor, latents, embeds, factors.requires_grad_(True))
    assert predictor.sample_passes == 3 + 3 * (1 + BACKWARD_PASSES)


def test_hooks_and_frozen_weights_end_with_an_error_too(predictor):
    factors = split_by_layer(closed_gates([], predictor.sizes)[None], predictor.sizes)
    with pytest.raises(ZeroDivisionError), frozen_weights(predictor), scaled(predictor.layers, factors):
        raise ZeroDivisionError
    assert all(not layer._forward_hooks for layer in predictor.layers.values())
    assert all(parameter.requires_grad for parameter in predictor.pipe.unet.parameters())


def test_samples_of_a_batch_may_have_timesteps_of_their_own(predictor):
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"] * 3)
    factors = closed_gates([], predictor.sizes)[None]
    with torch.no_grad():
        mixed = predict_gated(predictor, latents, embeds, factors, torch.tensor([961, 501, 1]))
    for row, timestep in enumerate((961, 501, 1)):
        alone = predictor.predict_each(latents, embeds, [()] * 3, timestep=timestep)
        torch.testing.assert_close(mixed[row], alone[row])


def test_drawn_gates_are_closed_open_and_between_and_the_same_for_a_seed():
    logits = torch.zeros(20_000)
    drawn = draw_closings(logits, torch.Generator().manual_seed(1))
    again = draw_closings(logits, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, draw_closings(logits, torch.Generator().manual_seed(2)))
    assert (drawn == 0).any() and (drawn == 1).any() and ((drawn > 0) & (drawn < 1)).any()
    touched = float((drawn > 0).float().mean())
    assert touched == pytest.approx(float(touched_probabilities(logits)[0]), abs=0.01)
    assert settled_closings(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("side", [16, 64])
def test_soft_scoring_is_the_scoring(side):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, side, side, generator=generator)
    noise = latents + torch.randn(4, 4, side, side, generator=generator)
    soft = soft_noise_difference(noise, latents)
    torch.testing.assert_close(soft, noise_difference(noise, latents))
    close = (soft + 0.05 * torch.rand(soft.shape, generator=generator)).clamp(0, 1)
    torch.testing.assert_close(soft_similarity(soft, close, BETAS), similarity(soft, close, BETAS))


def test_a_scale_that_is_not_alike_at_all_leaves_the_gradient_of_the_others():
    """Plain multi-scale SSIM is flat there: it is a product, and one factor is 0."""
    smooth = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.functional.interpolate(smooth, size=16, mode="bilinear")
    board = (torch.arange(16)[:, None] + torch.arange(16)[None]) % 2 - 0.5
    a, b = (0.25 + 0.5 * coarse + 0.3 * board).clamp(0, 1), (0.3 + 0.4 * coarse - 0.3 * board).clamp(0, 1)
    sizes = []
    for function in (similarity, soft_similarity):
        leaf = a.clone().requires_grad_(True)
        function(leaf, b, BETAS).sum().backward()
        assert leaf.grad.isfinite().all()
        sizes.append(float(leaf.grad.norm()))
    assert sizes[0] == 0 and sizes[1] > 0


def test_a_flat_channel_has_a_finite_gradient():
    flat = torch.zeros(1, 4, 16, 16, requires_grad=True)
    soft_noise_difference(flat, torch.zeros_like(flat)).sum().backward()
    assert flat.grad.isfinite().all()
