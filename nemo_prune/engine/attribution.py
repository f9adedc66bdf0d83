"""What each neuron does for memorized captions and costs ordinary ones, by gradients along the way from open to closed.

Integrated gradients (Sundararajan et al., arXiv 1703.01365) on the gates of all neurons at once: a few backward
passes stand for one pass a neuron.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import frozen_weights, predict_gated
from nemo_prune.engine.memory import in_parts
from nemo_prune.engine.ordinary import OrdinaryStates, share_of_everything
from nemo_prune.engine.soft_similarity import soft_noise_difference, soft_similarity
from nemo_prune.engine.views import Views

# Where on the way from open (1) to closed (0) gradients are taken; midpoints of equal parts.
POINTS = 4
_AT_ONCE = 32


@dataclass(frozen=True)
class Attribution:
    """What closing all gates does, divided among the neurons.

    Attributes:
        values: share of each neuron, [neurons]; above 0 where closing its gate lowers the measure.
        total: by how much the measure falls in all; the values come near to it.
    """

    values: Tensor
    total: float


def benefits(
    predictor: NoisePredictor,
    memorized: Views,
    position: int,
    points: int = POINTS,
    closed: Tensor | None = None,
    resembled: int | None = None,
) -> Attribution:
    """How much of a memorized caption's fall in similarity each neuron brings about.

    Three sample passes a seed and point, and two a seed for the total.

    Args:
        predictor: the model.
        memorized: memorized captions, nothing suppressed.
        position: of the caption.
        points: gradients that are averaged.
        closed: 1 for neurons that are suppressed already, [neurons].
        resembled: position of the caption whose unsuppressed prediction it is similar to; its own unless given.
    """
    seeds, betas = memorized.seeds, predictor.settings.ssim_betas
    originals = memorized.differences[position if resembled is None else resembled]

    def similarity_under(factors: Tensor, part: slice) -> Tensor:
        latents = seeds.latents[part].to(factors.device)
        prompt_embeds = memorized.prompt_embeds[position].expand(len(latents), -1, -1)
        noise_pred = predict_gated(predictor, latents, prompt_embeds, factors, seeds.timesteps[part])
        return soft_similarity(soft_noise_difference(noise_pred, latents), originals[part].to(factors.device), betas)

    return _integrate(predictor, similarity_under, len(seeds), points, closed=closed)


def costs(
    predictor: NoisePredictor,
    states: OrdinaryStates,
    chosen: Sequence[int],
    points: int = POINTS,
    held_open: Tensor | None = None,
) -> Attribution:
    """How much of the change on ordinary captions each neuron brings about; the values are at least 0.

    Args:
        predictor: the model.
        states: points on the ways of ordinary captions.
        chosen: which of them, three sample passes each and point.
        points: gradients that are averaged.
        held_open: 1 for neurons that act all the way, [neurons]; the others are closed together.
    """
    rows = torch.tensor(list(chosen))

    def change_under(factors: Tensor, part: slice) -> Tensor:
        here = rows[part]
        noise_pred = predict_gated(
            predictor, states.latents[here], states.prompt_embeds[here], factors, states.timesteps[here]
        )
        return share_of_everything(noise_pred, states, here)

    attribution = _integrate(predictor, change_under, len(rows), points, held_open=held_open)
    return Attribution((-attribution.values).clamp_min(0), -attribution.total)


def _integrate(
    predictor: NoisePredictor,
    measure: Callable[[Tensor, slice], Tensor],
    num_samples: int,
    points: int,
    closed: Tensor | None = None,
    held_open: Tensor | None = None,
) -> Attribution:
    """Divide what a measure falls by among the gates, on the straight way from open to closed.

    Args:
        predictor: the model.
        measure: of some samples under factors, [samples]; its mean over all of them is what is divided.
        num_samples: all of them; as many at once go through the U-Net as memory takes.
        points: gradients that are averaged.
        closed: 1 for neurons that are suppressed already.
        held_open: 1 for neurons that act all the way.
    """
    device = predictor.device
    start = torch.ones(sum(predictor.sizes.values()), device=device)
    if closed is not None:
        start = start - closed.to(device)
    end = torch.zeros_like(start) if held_open is None else held_open.to(device)
    values, what = torch.zeros_like(start), "a backward pass of one sample"

    def gradient(place: Tensor, part: slice) -> Tensor:
        factors = place[None].clone().requires_grad_(True)
        return torch.autograd.grad(measure(factors, part).sum(), factors)[0][0]

    @torch.no_grad()
    def fall(part: slice) -> Tensor:
        return (measure(start[None], part) - measure(end[None], part)).sum()

    with frozen_weights(predictor):
        for point in range(points):
            place = torch.lerp(start, end, (point + 0.5) / points)
            values += sum(in_parts(partial(gradient, place), num_samples, _AT_ONCE, what)) * (start - end) / points
        total = float(sum(in_parts(fall, num_samples, _AT_ONCE, what)))
    return Attribution(values / num_samples, total / num_samples)
