import pytest
import torch
from diffusers import DDIMScheduler

from conftest import tiny_pipeline
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask, suppress
from nemo_prune.errors import MaskError
from nemo_prune.mask import NeuronMask
from nemo_prune.settings import LocalizationSettings

SETTINGS = LocalizationSettings(num_samples=3)


@pytest.fixture(scope="module")
def predictor(pipe):
    return NoisePredictor(pipe, SETTINGS)


def random_mask(predictor, seed, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return NeuronMask({name: torch.rand(n, generator=generator) < share for name, n in predictor.sizes.items()})


def zero_rows(predictor, mask):
    with torch.no_grad():
        for name, layer in predictor.layers.items():
            layer.weight[mask.layers[name]] = 0.0


def test_suppressing_equals_pruning_to_the_last_bit(tmp_path):
    predictor = NoisePredictor(tiny_pipeline(tmp_path), SETTINGS)
    mask = random_mask(predictor, 0)
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    unsuppressed = predictor.predict_noise(latents, embeds)
    suppressed = predictor.predict_noise(latents, embeds, [mask])
    assert not torch.equal(unsuppressed, suppressed)
    zero_rows(predictor, mask)
    assert torch.equal(predictor.predict_noise(latents, embeds), suppressed)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent").images


@pytest.mark.parametrize("projections", ["value", "key", "both"])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_keys_and_values_are_suppressed_or_scaled_as_their_rows_are(tmp_path, projections, scale):
    settings = LocalizationSettings(num_samples=3, projections=projections)
    predictor = NoisePredictor(tiny_pipeline(tmp_path), settings, scale=scale)
    assert len(predictor.layers) == (14 if projections == "both" else 7)
    mask = random_mask(predictor, 0, share=0.9)
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    unsuppressed, suppressed = predictor.predict_noise(latents, embeds, [None, mask])
    with apply_mask(predictor.pipe, mask, scale):
        drawn = draw(predictor.pipe)
    with torch.no_grad():
        for name, layer in predictor.layers.items():
            layer.weight[mask.layers[name]] *= scale
    in_the_weights = predictor.predict_noise(latents, embeds)[0]
    assert not torch.allclose(unsuppressed, suppressed, atol=1e-4)
    if scale:
        torch.testing.assert_close(in_the_weights, suppressed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draw(predictor.pipe), drawn, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(in_the_weights, suppressed) and torch.equal(draw(predictor.pipe), drawn)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_many_masks_at_once_are_as_one_by_one(pipe, batch_size):
    predictor = NoisePredictor(pipe, SETTINGS, batch_size)
    masks = [None, random_mask(predictor, 1), random_mask(predictor, 2), None]
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    together = predictor.predict_noise(latents, embeds, masks)
    assert together.shape == (4, 3, 4, 16, 16)
    assert predictor.sample_passes == 12
    for position, mask in enumerate(masks):
        alone = predictor.predict_noise(latents, embeds, [mask])[0]
        torch.testing.assert_close(together[position], alone, rtol=1e-4, atol=1e-5)


def test_the_timestep_is_the_second_of_the_schedule_and_the_papers_the_first(pipe):
    assert NoisePredictor(pipe, SETTINGS).timestep == 961
    assert NoisePredictor(pipe, LocalizationSettings.preset("paper")).timestep == 981


def test_initial_latents_are_the_released_codes(pipe):
    latents = NoisePredictor(pipe, LocalizationSettings()).initial_latents()
    torch.manual_seed(1)
    assert torch.equal(latents, torch.randn(10, 4, 16, 16))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_predicted_noise_is_what_ddim_derives(tmp_path, prediction_type):
    """DDIM's own step recombines its noise and sample; that fixes the noise for every prediction type."""
    pipe = tiny_pipeline(tmp_path, prediction_type)
    predictor = NoisePredictor(pipe, SETTINGS)
    latents, embeds = predictor.initial_latents(), predictor.encode(["a cat"])[0]
    noise_pred = predictor.predict_noise(latents, embeds)[0]
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        output = pipe.unet(latents, 961, encoder_hidden_states=embeds.expand(3, -1, -1)).sample
    step = scheduler.step(output, 961, latents)
    alpha, before = scheduler.alphas_cumprod[961], scheduler.alphas_cumprod[941]
    derived = (step.prev_sample - before.sqrt() * step.pred_original_sample) / (1 - before).sqrt()
    torch.testing.assert_close(noise_pred, derived, rtol=1e-3, atol=1e-3)
    assert 0 < alpha < before


def test_hooks_are_gone_after_an_exception(predictor):
    gates = {name: torch.ones(1, size, dtype=torch.bool) for name, size in predictor.sizes.items()}
    with pytest.raises(RuntimeError, match="inside"), suppress(predictor.layers, gates):
        assert all(layer._forward_hooks for layer in predictor.layers.values())
        raise RuntimeError("inside")
    assert not any(layer._forward_hooks for layer in predictor.layers.values())


def test_hooks_are_gone_when_one_can_not_be_registered(predictor):
    gates = {name: torch.ones(1, size, dtype=torch.bool) for name, size in predictor.sizes.items()}
    with pytest.raises(KeyError), suppress(predictor.layers, {**gates, "nowhere": torch.ones(1, 1, dtype=torch.bool)}):
        pass
    assert not any(layer._forward_hooks for layer in predictor.layers.values())


def test_apply_mask_suppresses_a_live_pipeline_and_gives_it_back(pipe, predictor):
    before = draw(pipe)
    with apply_mask(pipe, random_mask(predictor, 3, share=0.9)):
        masked = draw(pipe)
    assert not torch.equal(before, masked)
    assert torch.equal(before, draw(pipe))


def test_a_mask_of_another_model_is_refused(predictor):
    with pytest.raises(MaskError, match="not in the model"):
        predictor.predict_noise(
            predictor.initial_latents(),
            predictor.encode(["a"])[0],
            [NeuronMask({"x": torch.ones(2, dtype=torch.bool)})],
        )
