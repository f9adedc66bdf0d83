"""How far the three ways of taking the data's range lie apart near tau, on noise differences of SD's size or others.

    python -m benchmarks.ranges [--size 16] [--tau 0.73]

The multi-scale SSIM needs the range of the data. The released code leaves it to torchmetrics, which takes it anew at
every scale, jointly over all kept seeds of a prompt (`joint`). `pinned` is 1, `pair` is that of each pair alone, and
`one seed` is what a search that asks a single seed can know: the range of all unsuppressed seeds and of that one.

The noise differences are drawn: a part that two of them share, and a part of their own, both with spectra between
white noise and 1/f, mixed until the joint similarity is within .02 of tau.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch import Tensor

from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD
from nemo_prune.engine.similarity import extremes, joint_ranges, noise_difference, similarity

BETAS = (0.33, 0.33, 0.33)
NEAR = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--tau", type=float, default=RELEASED_CODE_THRESHOLD)
    parser.add_argument("--prompts", type=int, default=100)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    figures = {
        f"1/f^{power}": measure(power, arguments.size, arguments.tau, generator, arguments.prompts)
        for power in (0.0, 0.5, 1.0)
    }
    print(json.dumps(figures, indent=2))


def measure(
    power: float, size: int, tau: float, generator: torch.Generator, num_prompts: int, num_seeds: int = 10
) -> dict:
    """Distances from the joint way, over the seeds whose joint similarity is near tau.

    Args:
        power: of the frequency by which the amplitudes of the shared part fall.
        size: of the latents.
        tau: the threshold.
        generator: draws.
        num_prompts: how many prompts.
        num_seeds: seeds of each.
    """
    found: dict[str, list[Tensor]] = {"pinned": [], "pair": [], "one seed": []}
    for _ in range(num_prompts):
        before, after = near_tau(power, size, tau, num_seeds, generator)
        joint = by_range(before, after, "joint")
        near = (joint - tau).abs() < NEAR
        for name, distances in found.items():
            distances.append((by_range(before, after, name) - joint)[near])
    return {name: _summary(torch.cat(distances)) for name, distances in found.items()}


def by_range(before: Tensor, after: Tensor, way: str) -> Tensor:
    """Similarities of noise differences without and with suppression, [S], by one way of taking the range."""
    if way == "pinned":
        return similarity(after, before, BETAS)
    unsuppressed, suppressed = extremes(before, len(BETAS)), extremes(after, len(BETAS))
    seeds = range(len(before))
    ranges = {
        "joint": lambda: joint_ranges(suppressed, unsuppressed).expand(len(before), -1),
        "pair": lambda: torch.stack([joint_ranges(suppressed[[s]], unsuppressed[[s]]) for s in seeds]),
        "one seed": lambda: torch.stack([joint_ranges(suppressed[[s]], unsuppressed) for s in seeds]),
    }
    return similarity(after, before, BETAS, ranges[way]())


def near_tau(power: float, size: int, tau: float, num_seeds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise differences of seeds before and after, mixed until half of the joint similarities are above tau."""
    shape = (num_seeds, 4, size, size)
    shared, own, other = (coloured(power, shape, generator) for _ in range(3))
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        # Seeds differ, as those of a prompt do.
        weights = (share + torch.linspace(-0.02, 0.02, num_seeds)).clamp(0, 1)[:, None, None, None]
        mixed = [(weights.sqrt() * shared + (1 - weights).sqrt() * each) for each in (own, other)]
        before, after = (noise_difference(each, torch.zeros(1)) for each in mixed)
        if by_range(before, after, "joint").median() > tau:
            high = share
        else:
            low = share
    return before, after


def coloured(power: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose amplitudes fall with a power of the frequency, of deviation 1."""
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    vertical, horizontal = torch.fft.fftfreq(shape[-2])[:, None], torch.fft.rfftfreq(shape[-1])[None]
    frequency = torch.sqrt(vertical**2 + horizontal**2).clamp_min(1 / max(shape[-2:]))
    noise = torch.fft.irfft2(spectrum / frequency**power, s=shape[-2:])
    return noise / noise.std()


def _summary(distances: Tensor) -> dict:
    """Median, and the largest distance on either side."""
    if not len(distances):
        return {"seeds": 0}
    low, median, high = (float(distances.quantile(q)) for q in (0.0, 0.5, 1.0))
    digits = 5
    assert math.isfinite(median)
    return {
        "seeds": len(distances),
        "median": round(median, digits),
        "lowest": round(low, digits),
        "highest": round(high, digits),
    }


if __name__ == "__main__":
    main()
