"""What captions make a model predict on the same seeds, and how that compares with the memorized ones'."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.similarity import memorization_scores, noise_difference, similarity
from nemo_prune.mask import Neuron

# Memorized captions that a prediction is compared with: those that it correlates with most.
_LIKELY = 3
# Pairs of noise differences that are compared in one go.
_AT_ONCE = 512


@dataclass(frozen=True)
class Views:
    """What captions make a model predict on the same seeds, under one set of suppressed neurons.

    Attributes:
        prompts: P captions.
        prompt_embeds: their text embeddings [P, positions, width].
        seeds: the latents and timesteps, the same for all.
        differences: noise differences [P, S, channels, height, width] in 0..1.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Tensor
    seeds: "Seeds"
    differences: Tensor


@dataclass(frozen=True)
class Seeds:
    """Initial latents, each with the timestep at which the noise is predicted on it.

    Attributes:
        latents: pure noise [S, channels, height, width].
        timesteps: of the model's training, [S].
    """

    latents: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __add__(self, other: "Seeds") -> "Seeds":
        return Seeds(torch.cat([self.latents, other.latents]), torch.cat([self.timesteps, other.timesteps]))

    @classmethod
    def of(cls, latents: Tensor, timestep: int) -> "Seeds":
        """Latents that share a timestep."""
        return cls(latents, torch.full((len(latents),), timestep))

    @classmethod
    def draw(
        cls,
        predictor: NoisePredictor,
        seed: int | None = None,
        num: int | None = None,
        timestep: int | None = None,
    ) -> "Seeds":
        """Draw latents on the CPU; seed, number and timestep are the predictor's own unless given."""
        timestep = predictor.timestep if timestep is None else timestep
        return cls.of(predictor.initial_latents(seed, num), timestep)


@dataclass(frozen=True)
class Measures:
    """Multi-scale SSIM of captions' noise differences.

    Attributes:
        own: to the caption's own unsuppressed prediction on the same seed, [P, S]; empty for ordinary ones.
        resemblance: to the nearest of all memorized captions' unsuppressed predictions on the same seed, [P, S].
        nearest: which one that is, [P, S].
        agreement: of the caption's seeds of one timestep with each other, the mean of all pairs, [P, S].
    """

    own: Tensor
    resemblance: Tensor
    nearest: Tensor
    agreement: Tensor


def observe(predictor: NoisePredictor, prompts: Sequence[str], seeds: Seeds, neurons: Collection[Neuron] = ()) -> Views:
    """Predict captions' noise differences on the same seeds; one sample pass a caption and seed.

    Args:
        predictor: the model.
        prompts: texts.
        seeds: initial latents and timesteps.
        neurons: what is suppressed.
    """
    prompt_embeds = predictor.encode(prompts)
    return Views(tuple(prompts), prompt_embeds, seeds, differences_of(predictor, prompt_embeds, seeds, neurons))


def differences_of(
    predictor: NoisePredictor, prompt_embeds: Tensor, seeds: Seeds, neurons: Collection[Neuron] = ()
) -> Tensor:
    """Noise differences of captions, [P, S, channels, height, width]; one sample pass a caption and seed.

    Args:
        predictor: the model.
        prompt_embeds: their text embeddings [P, positions, width].
        seeds: initial latents and timesteps.
        neurons: what is suppressed.
    """
    latents = seeds.latents.to(predictor.pipe.unet.device)
    found = latents.new_empty(len(prompt_embeds), *latents.shape)
    for timestep in seeds.timesteps.unique().tolist():
        there = (seeds.timesteps == timestep).nonzero().flatten()
        # As many captions at once as fill whole batches.
        for start in range(0, len(prompt_embeds), predictor.batch_size):
            part = prompt_embeds[start : start + predictor.batch_size]
            noise_pred = predictor.predict_each(
                latents[there].repeat(len(part), 1, 1, 1),
                part.repeat_interleave(len(there), dim=0),
                [neurons] * (len(part) * len(there)),
                timestep=timestep,
            )
            differences = noise_difference(noise_pred, latents[there].repeat(len(part), 1, 1, 1))
            found[start : start + len(part), there] = differences.unflatten(0, (len(part), len(there)))
    return found


def measure(views: Views, memorized: Views, betas: Sequence[float]) -> Measures:
    """Compare captions' predictions with those of all memorized captions, and the seeds with each other.

    Args:
        views: under a mask.
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    nearest = [_nearest(differences, memorized, betas) for differences in views.differences]
    own = views.differences.new_zeros(0, len(views.seeds))
    if views.prompts == memorized.prompts:
        own = _compare(views.differences.flatten(0, 1), memorized.differences.flatten(0, 1), betas)
        own = own.unflatten(0, views.differences.shape[:2])
    return Measures(
        own=own,
        resemblance=torch.stack([each[0] for each in nearest]),
        nearest=torch.stack([each[1] for each in nearest]),
        agreement=_agreement(views, betas),
    )


def measure_one(position: int, differences: Tensor, memorized: Views, betas: Sequence[float]) -> Measures:
    """How one memorized caption measures under a mask; the first dimension of all is 1.

    Args:
        position: of the caption in the memorized ones.
        differences: its noise differences under the mask [S, channels, height, width].
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    here = slice(position, position + 1)
    part = Views(memorized.prompts[here], memorized.prompt_embeds[here], memorized.seeds, memorized.differences[here])
    own = _compare(differences, part.differences[0], betas)
    resemblance, nearest = _nearest(differences, memorized, betas)
    agreement = _agreement(replace(part, differences=differences[None]), betas)
    return Measures(own[None], resemblance[None], nearest[None], agreement)


def _agreement(views: Views, betas: Sequence[float]) -> Tensor:
    """Mean similarity of the seeds of the same timestep, [P, S]; -1 where a seed is alone."""
    timesteps = views.seeds.timesteps
    found = torch.full((len(views.prompts), len(timesteps)), -1.0)
    for timestep in timesteps.unique():
        there = timesteps == timestep
        if int(there.sum()) > 1:
            scores = memorization_scores(views.differences[:, there], betas)
            found[:, there] = torch.stack([score.values.mean() for score in scores])[:, None]
    return found


def _nearest(differences: Tensor, memorized: Views, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The highest similarity to any memorized caption on the same seed, and which one that is, both [S].

    Similarities are taken with those alone whose noise differences correlate most: a corpus of 500 would else cost
    500 of them a seed.
    """
    likely = correlation(differences, memorized.differences).topk(min(_LIKELY, len(memorized.prompts)), dim=0).indices
    columns = torch.arange(len(differences), device=differences.device)
    compared = torch.stack([_compare(differences, memorized.differences[row, columns], betas) for row in likely])
    highest = compared.max(dim=0)
    return highest.values, likely.cpu()[highest.indices, torch.arange(len(differences))]


def correlation(differences: Tensor, originals: Tensor) -> Tensor:
    """Correlation of noise differences [S, ...] with those of captions on the same seeds [P, S, ...], [P, S]."""
    a, b = differences.flatten(1), originals.flatten(2)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=2, keepdim=True)
    return (a * b).sum(dim=2) / (a.norm(dim=1) * b.norm(dim=2)).clamp_min(1e-12)


def _compare(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """Similarity of noise differences [batch, ...] with as many others, [batch], on the CPU."""
    parts = [
        similarity(a[start : start + _AT_ONCE], b[start : start + _AT_ONCE], betas)
        for start in range(0, len(a), _AT_ONCE)
    ]
    return torch.cat(parts).cpu()
