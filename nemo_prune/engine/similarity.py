"""How much a model's first noise predictions agree: noise difference, similarity, score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as multiscale_ssim,
)

from nemo_prune.errors import ModelError

# Smallest side in pixels -> Gaussian sigma, and the `kernel_size` that passes torchmetrics' check
# of the size (the taps follow from sigma alone: 11, 9 and 5). The first row is the paper's.
_SSIM_WINDOWS = ((44, 1.5, 11), (28, 1.0, 7), (12, 0.5, 3))


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
    for least, sigma, kernel_size in _SSIM_WINDOWS:
        if min(height, width) >= least:
            return sigma, kernel_size
    raise ModelError(
        f"The latents are {height}x{width}; at least {_SSIM_WINDOWS[-1][0]} per side are needed to "
        "compare them at three scales."
    )


def similarity(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """Multi-scale SSIM of noise differences, sample by sample (Alg. 1).

    Args:
        a: noise differences [batch, channels, height, width] in 0..1.
        b: as many others.
        betas: exponent per scale.

    Returns:
        [batch], at most 1.
    """
    sigma, kernel_size = ssim_window(*a.shape[-2:])
    return multiscale_ssim(
        a, b, sigma=sigma, kernel_size=kernel_size, betas=tuple(betas), data_range=1.0,
        normalize="relu", reduction="none",
    ).reshape(-1)  # fmt: skip


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


def memorization_scores(noise_differences: Tensor, betas: Sequence[float]) -> list[MemorizationScore]:
    """Compare the noise differences of prompts' seeds in pairs (Alg. 1).

    Args:
        noise_differences: [prompts, S, channels, height, width] in 0..1.
        betas: exponent per scale of the multi-scale SSIM.
    """
    num_prompts, count = noise_differences.shape[:2]
    rows, columns = torch.triu_indices(count, count, offset=1)
    left, right = noise_differences[:, rows].flatten(0, 1), noise_differences[:, columns].flatten(0, 1)
    values = similarity(left, right, betas).cpu().reshape(num_prompts, -1)
    pairs = torch.full((num_prompts, count, count), -1.0)
    pairs[:, rows, columns] = values
    pairs[:, columns, rows] = values
    return [MemorizationScore(each) for each in pairs]
