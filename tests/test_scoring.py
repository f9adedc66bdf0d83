import pytest
import torch

from nemo_prune.engine.similarity import memorization_scores, noise_difference, similarity, ssim_window
from nemo_prune.errors import ModelError

BETAS = (0.33, 0.33, 0.33)


def test_noise_difference_is_rescaled_per_sample_and_channel():
    latents, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16) * 5
    delta = noise_difference(noise, latents)
    assert delta.amin((-2, -1)).eq(0).all() and delta.amax((-2, -1)).eq(1).all()
    torch.testing.assert_close(noise_difference(noise * 2, latents * 2), delta)


def test_a_constant_channel_becomes_zero_where_the_released_code_divides_by_zero():
    latents = torch.randn(2, 4, 16, 16)
    noise = torch.randn(2, 4, 16, 16)
    noise[:, 1] = latents[:, 1]
    delta = noise_difference(noise, latents)
    assert delta[:, 1].eq(0).all() and delta.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_noise_that_is_not_finite_is_an_error_not_a_find(value):
    noise = torch.zeros(1, 4, 16, 16)
    noise[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="float32"):
        noise_difference(noise, torch.zeros(1, 4, 16, 16))


def test_the_papers_window_from_44_pixels_and_narrower_ones_below():
    assert ssim_window(64, 64) == (1.5, 11)
    assert ssim_window(44, 64)[0] == 1.5
    assert ssim_window(64, 43)[0] < 1.5
    with pytest.raises(ModelError, match="12"):
        ssim_window(8, 64)


@pytest.mark.parametrize("side", [12, 16, 27, 28, 43, 44, 64])
def test_similarity_is_one_for_the_same_and_low_for_unrelated(side):
    a, b = torch.rand(2, 4, side, side), torch.rand(2, 4, side, side)
    torch.testing.assert_close(similarity(a, a, BETAS), torch.ones(2))
    assert similarity(a, b, BETAS).max() < 0.3


def test_memorization_score_is_the_highest_pair_and_keeps_its_seeds():
    picture = torch.rand(4, 16, 16)
    seeds = torch.rand(5, 4, 16, 16)
    seeds[1] = picture
    seeds[3] = picture + 0.01 * torch.rand(4, 16, 16)
    result, other = memorization_scores(torch.stack([seeds, torch.rand(5, 4, 16, 16)]), BETAS)
    assert other.score < 0.3
    assert result.score > 0.95
    assert result.kept_seeds(0.5).tolist() == [False, True, False, True, False]
    assert len(result.values) == 10
    torch.testing.assert_close(result.values.max(), torch.tensor(result.score))
