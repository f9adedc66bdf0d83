"""The similarity beside torchmetrics' own call, which the released code makes without naming a range of the data."""

import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale_ssim

from benchmarks.ranges import by_range, near_tau
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.similarity import (
    extremes,
    joint_ranges,
    joint_reach,
    memorization_scores,
    noise_difference,
    similarity,
)
from nemo_prune.engine.trials import Trial
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings, ModelOptions

BETAS = (0.33, 0.33, 0.33)
SSIM = {"sigma": 1.5, "kernel_size": 11, "betas": BETAS, "normalize": "relu", "reduction": "none"}


@pytest.fixture(scope="module")
def before_and_after():
    """Noise differences of 6 seeds, 64x64, with and without suppression, alike by about tau."""
    generator = torch.Generator().manual_seed(0)
    shared, own, other = (torch.randn(6, 4, 64, 64, generator=generator) for _ in range(3))
    return [noise_difference(0.68 * shared + 0.73 * each, torch.zeros(1)) for each in (own, other)]


def test_the_joint_range_is_what_torchmetrics_takes_from_one_call(before_and_after):
    before, after = before_and_after
    ranges = joint_ranges(extremes(after, 3), extremes(before, 3))
    found = similarity(after, before, BETAS, ranges.expand(6, -1))
    torch.testing.assert_close(found, multiscale_ssim(after, before, **SSIM), rtol=0, atol=1e-6)
    assert 0.3 < float(found.median()) < 0.55
    # One seed alone has another range, and so another similarity.
    alone = torch.cat([multiscale_ssim(after[[s]], before[[s]], **SSIM) for s in range(6)])
    assert float((alone - found).abs().max()) > 1e-3


def test_without_ranges_it_is_one(before_and_after):
    before, after = before_and_after
    expected = multiscale_ssim(after, before, data_range=1.0, **SSIM)
    torch.testing.assert_close(similarity(after, before, BETAS), expected, rtol=0, atol=1e-6)


def test_pairs_of_seeds_are_compared_as_in_one_call(before_and_after):
    before, _ = before_and_after
    rows, columns = torch.triu_indices(6, 6, offset=1)
    (found,) = memorization_scores(before[None], BETAS, joint=True)
    torch.testing.assert_close(found.values, multiscale_ssim(before[rows], before[columns], **SSIM), rtol=0, atol=1e-6)


def test_a_seed_alone_is_never_above_all_together_and_not_far_below(before_and_after):
    before, after = before_and_after
    unsuppressed, suppressed = extremes(before, 3), extremes(after, 3)
    joint = similarity(after, before, BETAS, joint_ranges(suppressed, unsuppressed).expand(6, -1))
    ranges = torch.stack([joint_ranges(suppressed[[s]], unsuppressed) for s in range(6)])
    alone = similarity(after, before, BETAS, ranges)
    assert bool((alone <= joint + 1e-6).all())
    assert 0 < float((joint - alone).max()) < joint_reach(64, 64)


@pytest.mark.parametrize("size", [12, 16, 32, 48, 64])
def test_a_seed_alone_is_within_the_reach_of_its_size(size):
    generator, furthest = torch.Generator().manual_seed(0), 0.0
    for _ in range(10):
        before, after = near_tau(0.0, size, 0.428, 10, generator)
        joint, alone = (by_range(before, after, way) for way in ("joint", "one seed"))
        near = (joint - 0.428).abs() < 0.02
        furthest = max(furthest, float((joint - alone)[near].max()))
    assert 0.2 * joint_reach(size, size) < furthest < joint_reach(size, size)


def test_what_is_asked_beside_a_seed_changes_its_answer_only_where_all_are_asked_at_once(pipe):
    scorer = Scorer(NoisePredictor(pipe, LocalizationSettings(num_samples=4)))
    (scored,) = scorer.score_prompts(["a cat"])
    neurons = frozenset(Neuron(layer, index) for layer in scorer.predictor.sizes for index in range(4))
    seeds = (0, 1, 2, 3)
    apart = [(scored, Trial(neurons, seed, 0.4, seeds)) for seed in seeds]
    together = [(scored, trial._replace(at_once=True)) for _, trial in apart]
    assert scorer.answer(apart) == [scorer.answer([each])[0] for each in apart]
    joint = scorer.answer(together)
    assert joint != scorer.answer(apart)
    assert all(high >= low - 1e-6 for high, low in zip(joint, scorer.answer(apart), strict=True))
    pinned = Scorer(NoisePredictor(pipe, LocalizationSettings(num_samples=4, data_range="one")))
    assert pinned.answer(apart) == pinned.answer(together)


@pytest.fixture
def tf32():
    """TensorFloat-32 is allowed, as torch does it for convolutions by default."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_float32_is_computed_in_full_whatever_torch_is_set_to(pipe, monkeypatch, tf32):
    seen, forward = [], pipe.unet.forward

    def noted(*args, **kwargs):
        seen.append(tf32())
        return forward(*args, **kwargs)

    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=2))
    monkeypatch.setattr(pipe.unet, "forward", noted)
    predictor.predict_noise(predictor.initial_latents(), predictor.encode(["a cat"])[0])
    assert seen and set(seen) == {(False, False)}
    assert tf32() == (True, True)


def test_the_margin_follows_the_precision_unless_it_is_given():
    margins = [ModelOptions(dtype=dtype).margin_of_dtype for dtype in ("float32", "float16", "bfloat16")]
    assert margins == sorted(margins) and margins[0] == 0 < margins[1] < margins[2]
    assert ModelOptions(dtype="bfloat16", margin=0.3).margin_of_dtype == 0.3
