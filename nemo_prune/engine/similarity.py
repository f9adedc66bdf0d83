"""How much a model's first noise predictions agree: noise difference, similarity, score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import BoolTensor, Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from nemo_prune.engine.precision import full_float32
from nemo_prune.errors import ModelError


class _Comparison(NamedTuple):
    """How noise differences of a size are compared.

    Attributes:
        least: the smallest side in pixels.
        sigma: of the Gaussian window.
        kernel_size: passes torchmetrics' check of the size (the taps follow from sigma alone: 11, 9 and 5).
        reach: how far the similarity of a seed alone may be below the one with the range of the data taken over all
            kept seeds: the most that was measured near tau, from white noise to 1/f (benchmarks/ranges.py).
    """

    least: int
    sigma: float
    kernel_size: int
    reach: float


# The window of the first two is the paper's.
_COMPARISONS = (
    _Comparison(64, 1.5, 11, 0.006),
    _Comparison(44, 1.5, 11, 0.007),
    _Comparison(28, 1.0, 7, 0.006),
    _Comparison(12, 0.5, 3, 0.016),
)


def noise_difference(noise_pred: Tensor, latents: Tensor) -> Tensor:
    """The predicted noise minus the initial latents, rescaled to 0..1 (Alg. 1).

    Minimum and maximum are taken per sample and per channel. A channel without any variation
    becomes 0; the released code divides by zero there.

    Args:
        noise_pred: predicted noise [..., channels, height, width].
        latents: initial latents of a shape that broadcasts to it.

    Returns:
        [..., channels, height, width], float32, in 0..1.

    Raises:
        ModelError: the predicted noise is not finite.
    """
    delta = noise_pred.float() - latents.float()
    if not delta.isfinite().all():
        raise ModelError(
            "The model predicts noise that is not finite (NaN or infinity). Use --dtype float32; "
            "if it persists, the checkpoint is damaged."
        )
    low = delta.amin(dim=(-2, -1), keepdim=True)
    span = delta.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span == 0, 0.0, (delta - low) / span)


def ssim_window(height: int, width: int) -> tuple[float, int]:
    """Gaussian sigma and kernel size of the multi-scale SSIM for latents of a size.

    The paper's window (sigma 1.5, 11 taps) needs 44 pixels per side at three scales; smaller
    latents get a narrower one.

    Raises:
        ModelError: the latents are smaller than 12 pixels per side.
    """
    comparison = _comparison(height, width)
    return comparison.sigma, comparison.kernel_size


def joint_reach(height: int, width: int) -> float:
    """How far a seed's similarity alone may be below the one with the range of the data taken over all kept seeds.

    Raises:
        ModelError: the latents are smaller than 12 pixels per side.
    """
    return _comparison(height, width).reach


def _comparison(height: int, width: int) -> _Comparison:
    for each in _COMPARISONS:
        if min(height, width) >= each.least:
            return each
    raise ModelError(
        f"The latents are {height}x{width}; at least {_COMPARISONS[-1].least} per side are needed to "
        "compare them at three scales."
    )


@full_float32()
def similarity(
    a: Tensor, b: Tensor, betas: Sequence[float], ranges: Tensor | None = None, least: float = 0.0
) -> Tensor:
    """Multi-scale SSIM of noise differences, sample by sample (Alg. 1).

    torchmetrics' multi-scale SSIM takes one range for a whole call, so its scales are put together here, each with
    ranges of the samples' own.

    Args:
        a: noise differences [batch, channels, height, width] in 0..1.
        b: as many others.
        betas: exponent per scale.
        ranges: the range of the data of each sample at each scale, [batch, scales], see :func:`joint_ranges`; 1 where
            it is not given.
        least: what each scale's similarity counts as at least.

    Returns:
        [batch], at most 1.
    """
    sigma, kernel_size = ssim_window(*a.shape[-2:])
    product = torch.ones(len(a), device=a.device)
    for scale, beta in enumerate(betas):
        whole, contrast = ssim(
            a, b, sigma=sigma, kernel_size=kernel_size, reduction="none", return_contrast_sensitivity=True,
            data_range=1.0 if ranges is None else ranges[:, scale, None, None, None],
        )  # fmt: skip
        last = scale == len(betas) - 1
        product = product * (whole if last else contrast).clamp_min(least) ** beta
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def extremes(noise_differences: Tensor, num_scales: int) -> Tensor:
    """Lowest and highest value of each sample at every scale of the multi-scale SSIM.

    Args:
        noise_differences: [batch, channels, height, width].
        num_scales: how often they are compared, each time at half the size.

    Returns:
        [batch, num_scales, 2]: minimum and maximum.
    """
    found = []
    for _ in range(num_scales):
        found.append(torch.stack(noise_differences.flatten(1).aminmax(dim=1), dim=1))
        noise_differences = F.avg_pool2d(noise_differences, 2)
    return torch.stack(found, dim=1)


def joint_ranges(*sides: Tensor) -> Tensor:
    """The range that torchmetrics takes from the data of one call, anew at every scale.

    Args:
        sides: :func:`extremes` of all samples on one side of the comparison, [samples, scales, 2].

    Returns:
        [scales]: the larger side's highest value minus its lowest.
    """
    return torch.stack([each[..., 1].amax(0) - each[..., 0].amin(0) for each in sides]).amax(0)


@dataclass(frozen=True)
class MemorizationScore:
    """How much the seeds of one prompt agree.

    Attributes:
        pairs: similarities of all pairs of seeds [S, S], symmetric, the diagonal -1.
    """

    pairs: Tensor

    @property
    def score(self) -> float:
        """The memorization score: the highest similarity of any pair."""
        return float(self.pairs.max())

    @property
    def values(self) -> Tensor:
        """Similarity of every pair once, [S (S - 1) / 2]."""
        rows, columns = torch.triu_indices(*self.pairs.shape, offset=1)
        return self.pairs[rows, columns]

    def kept_seeds(self, threshold: float) -> BoolTensor:
        """Which seeds agree with another one by more than the threshold, [S]."""
        return self.pairs.amax(dim=1) > threshold


def memorization_scores(
    noise_differences: Tensor, betas: Sequence[float], joint: bool = False
) -> list[MemorizationScore]:
    """Compare the noise differences of prompts' seeds in pairs (Alg. 1).

    Args:
        noise_differences: [prompts, S, channels, height, width] in 0..1.
        betas: exponent per scale of the multi-scale SSIM.
        joint: whether the range of the data is taken from all pairs of a prompt, else it is 1.
    """
    num_prompts, count = noise_differences.shape[:2]
    rows, columns = torch.triu_indices(count, count, offset=1)
    left, right = noise_differences[:, rows].flatten(0, 1), noise_differences[:, columns].flatten(0, 1)
    ranges = None
    if joint:
        of_seeds = extremes(noise_differences.flatten(0, 1), len(betas)).unflatten(0, (num_prompts, count))
        # Each seed but the last is once on the left, each but the first on the right.
        each = torch.stack([joint_ranges(of_prompt[:-1], of_prompt[1:]) for of_prompt in of_seeds])
        ranges = each.repeat_interleave(len(rows), dim=0)
    values = similarity(left, right, betas, ranges).cpu().reshape(num_prompts, -1)
    pairs = torch.full((num_prompts, count, count), -1.0)
    pairs[:, rows, columns] = values
    pairs[:, columns, rows] = values
    return [MemorizationScore(each) for each in pairs]
