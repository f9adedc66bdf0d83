"""What a mask changes for ordinary captions, all along the way from noise to image."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gates import predict_gated
from nemo_prune.engine.memory import in_parts
from nemo_prune.mask import Neuron, NeuronMask


@dataclass(frozen=True)
class OrdinaryStates:
    """Points on the ways of ordinary captions from noise to image, nothing suppressed.

    Attributes:
        prompt_embeds: text embeddings [N, positions, width].
        latents: the noisy latents there [N, channels, height, width].
        timesteps: of the model's training, [N].
        noise_pred: what is predicted there, [N, channels, height, width].
        span: by how much everything suppressed changes that at the same timestep, the root mean square over captions
            of the change's norm, [N]: the unit of all changes.
    """

    prompt_embeds: Tensor
    latents: Tensor
    timesteps: Tensor
    noise_pred: Tensor
    span: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def walk_ordinary(
    predictor: NoisePredictor, prompts: Sequence[str], num_points: int, seed: int, at_once: int = 32
) -> OrdinaryStates:
    """Walk from noise to image by DDIM without guidance, two sample passes a caption and point.

    Args:
        predictor: the model.
        prompts: ordinary captions.
        num_points: DDIM steps, and points that are kept of each caption.
        seed: of the initial latents, one a caption.
        at_once: captions that go through the U-Net together.
    """
    shut = torch.zeros(1, sum(predictor.sizes.values()), device=predictor.device)
    first = predictor.initial_latents(seed, len(prompts))

    def walk(part: slice) -> list[tuple[Tensor, ...]]:
        prompt_embeds, found = predictor.encode(prompts[part]), []
        for latents, timesteps, noise_pred in points_of_ways(predictor, prompt_embeds, first[part], num_points):
            emptied = predict_gated(predictor, latents, prompt_embeds, shut, timesteps)
            found.append((prompt_embeds, latents, timesteps, noise_pred, (emptied - noise_pred).flatten(1).norm(dim=1)))
        return found

    points = chain.from_iterable(in_parts(walk, len(prompts), at_once, "the model and one sample"))
    prompt_embeds, latents, timesteps, noise_pred, norms = (torch.cat(column) for column in zip(*points, strict=True))
    span = torch.empty_like(norms)
    for timestep in timesteps.unique():
        there = (timesteps == timestep).to(norms.device)
        span[there] = norms[there].square().mean().sqrt()
    return OrdinaryStates(prompt_embeds, latents, timesteps, noise_pred, span)


def points_of_ways(
    predictor: NoisePredictor, prompt_embeds: Tensor, latents: Tensor, num_points: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Walk captions from noise to image by DDIM without guidance, nothing suppressed, one sample pass a point.

    Args:
        predictor: the model.
        prompt_embeds: text embeddings [batch, positions, width].
        latents: initial latents [batch, channels, height, width].
        num_points: DDIM steps.

    Yields:
        Latents, timesteps [batch] and the noise that is predicted there, from the noisiest.
    """
    # What the model predicts was made noise of already.
    scheduler = DDIMScheduler.from_config(predictor.pipe.scheduler.config, prediction_type="epsilon")
    scheduler.set_timesteps(num_points)
    latents = latents.to(predictor.device)
    open_gates = torch.ones(1, sum(predictor.sizes.values()), device=predictor.device)
    for timestep in scheduler.timesteps:
        timesteps = torch.full((len(latents),), int(timestep))
        noise_pred = predict_gated(predictor, latents, prompt_embeds, open_gates, timesteps)
        yield latents, timesteps, noise_pred
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample


def share_of_everything(noise_pred: Tensor, states: OrdinaryStates, chosen: Tensor | slice) -> Tensor:
    """By how much a prediction is changed, as a share of what everything suppressed changes there, [batch].

    Args:
        noise_pred: predicted noise under a mask [batch, channels, height, width].
        states: points on the ways of ordinary captions.
        chosen: which of them were predicted.
    """
    change = (noise_pred - states.noise_pred[chosen]).flatten(1)
    # The norm has no gradient at 0, where nothing is changed yet.
    return (change.square().sum(dim=1) + 1e-12).sqrt() / states.span[chosen]


@torch.no_grad()
def change_by_timestep(
    predictor: NoisePredictor, states: OrdinaryStates, factors: Tensor, at_once: int = 32
) -> dict[int, float]:
    """Mean change of the noise prediction at every timestep, as a share of everything's; one sample pass a point.

    Args:
        predictor: the model.
        states: points on the ways of ordinary captions.
        factors: what each neuron's output is multiplied by, [neurons].
        at_once: points that go through the U-Net together.
    """
    changes = []
    for start in range(0, len(states), at_once):
        part = slice(start, start + at_once)
        noise_pred = predict_gated(
            predictor, states.latents[part], states.prompt_embeds[part], factors[None], states.timesteps[part]
        )
        changes.append(share_of_everything(noise_pred, states, part))
    joined = torch.cat(changes)
    return {
        timestep: float(joined[(states.timesteps == timestep).to(joined.device)].mean())
        for timestep in sorted(set(states.timesteps.tolist()), reverse=True)
    }


def mean_change(predictor: NoisePredictor, states: OrdinaryStates, neurons: Collection[Neuron]) -> float:
    """Change under a mask, with what stands in for it, the mean over the timesteps; one sample pass a point."""
    mask = predictor.in_weights(NeuronMask.from_neurons(neurons, predictor.sizes))
    open_gates = torch.ones(sum(predictor.sizes.values()), device=predictor.device)
    with apply_mask(predictor.pipe, mask, predictor.scale):
        changes = change_by_timestep(predictor, states, open_gates)
    return sum(changes.values()) / len(changes)
