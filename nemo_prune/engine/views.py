"""What captions make a model predict on the same seeds."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import named_shortage
from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.similarity import noise_difference
from nemo_prune.files.kept_tensors import kept_rows
from nemo_prune.mask import Neuron

# By how much sketches are smaller: they are the coarsest of the multi-scale SSIM's three scales.
_COARSER = 4


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

    def __getitem__(self, part: slice) -> "Seeds":
        return Seeds(self.latents[part], self.timesteps[part])

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
class Views:
    """What captions make a model predict on the same seeds, under one set of suppressed neurons.

    Attributes:
        prompts: P captions.
        prompt_embeds: their text embeddings [P, positions, width], on the CPU.
        seeds: the latents and timesteps, the same for all.
        differences: noise differences [P, S, channels, height, width] in 0..1, on the CPU, maybe mapped from a file.
        device: where predictions are compared with them.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Tensor
    seeds: Seeds
    differences: Tensor
    device: torch.device | str = "cpu"

    @cached_property
    def sketches(self) -> Tensor:
        """Small pictures of the noise differences, [S, P, numbers], on the device: all of a corpus' fit there."""
        with named_shortage("small pictures of all memorized captions' predictions"):
            seeds, numbers = _sketched(self.differences[0]).shape
            found = torch.empty(seeds, len(self.prompts), numbers, device=self.device)
            # A caption at a time: all of them may be larger than memory.
            for place, each in enumerate(self.differences):
                found[:, place] = _sketched(each)
            return found


def observe(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    seeds: Seeds,
    neurons: Collection[Neuron] = (),
    detected: Callable[[Sequence[str]], Sequence[ScoredPrompt]] | None = None,
    folder: Path | None = None,
) -> Views:
    """Predict captions' noise differences on the same seeds; one sample pass a caption and seed.

    Args:
        predictor: the model.
        prompts: texts.
        seeds: initial latents and timesteps.
        neurons: what is suppressed.
        detected: gives captions as they were scored on the first of the seeds: that is not predicted again.
        folder: where embeddings and differences are kept as they come; in memory unless given.
    """
    known = 0 if detected is None else predictor.settings.num_samples

    def groups(done: int) -> Iterator[tuple[slice, Sequence[str]]]:
        # As many captions at once as fill whole batches.
        for start in range(done, len(prompts), predictor.batch_size):
            part = slice(start, start + predictor.batch_size)
            yield part, prompts[part]

    def encode(done: int) -> Iterator[Tensor]:
        for _, texts in groups(done):
            yield torch.stack([each.prompt_embeds for each in detected(texts)]) if known else predictor.encode(texts)

    def predict(done: int) -> Iterator[Tensor]:
        for part, texts in groups(done):
            predicted = differences_of(predictor, prompt_embeds[part], seeds[known:], neurons).cpu()
            scored = [torch.stack([each.noise_differences for each in detected(texts)])] if known else []
            yield torch.cat([*scored, predicted], dim=1)

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    prompt_embeds = kept_rows(folder and folder / "embeds.npy", len(prompts), encode)
    differences = kept_rows(folder and folder / "differences.npy", len(prompts), predict)
    return Views(tuple(prompts), prompt_embeds, seeds, differences, predictor.device)


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
    latents = seeds.latents.to(predictor.device)
    found = latents.new_empty(len(prompt_embeds), *latents.shape)
    for timestep in seeds.timesteps.unique().tolist():
        there = (seeds.timesteps == timestep).nonzero().flatten()
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


def most_alike(differences: Tensor, views: Views, columns: Tensor, number: int) -> Tensor:
    """The captions whose noise differences are most alike to some by their sketches, best first, [number, N].

    Args:
        differences: noise differences of any captions, one a seed, [N, channels, height, width].
        views: captions, of which there may be fewer.
        columns: of the N seeds among those of the views, on the CPU.
        number: how many are wanted.
    """
    sketches = _sketched(differences)
    alike = [views.sketches[column] @ each for column, each in zip(columns.tolist(), sketches, strict=True)]
    return torch.stack(alike, dim=1).topk(min(number, len(views.prompts)), dim=0).indices.cpu()


def _sketched(differences: Tensor) -> Tensor:
    """Small pictures of noise differences [N, channels, height, width]: each channel around its mean, [N, numbers]."""
    coarse = avg_pool2d(differences, _COARSER).flatten(2)
    coarse = coarse - coarse.mean(dim=2, keepdim=True)
    return normalize(coarse, dim=2).flatten(1)
