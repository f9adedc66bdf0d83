"""What captions make a model predict on the same seeds, and how that compares with the memorized ones'."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import in_parts, named_shortage
from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.similarity import memorization_scores, noise_difference, similarity
from nemo_prune.files.kept_tensors import kept_rows
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask

# Memorized captions that a prediction is compared with: those whose sketches are most alike. On a model of 100 captions
# the nearest of all is among them in .9 of the cases, and always where it is nearer than .6 (benchmarks/RESULTS.md).
_LIKELY = 16
# By how much sketches are smaller: they are the coarsest of the multi-scale SSIM's three scales.
_COARSER = 4
# Pairs of noise differences that are compared in one go.
_AT_ONCE = 64
_COMPARING = "comparing the predictions of a caption"


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
    seeds: "Seeds"
    differences: Tensor
    device: torch.device | str = "cpu"

    @cached_property
    def sketches(self) -> Tensor:
        """Small pictures of the noise differences, [S, P, numbers], on the device: all of a corpus' fit there."""
        with named_shortage("small pictures of all memorized captions' predictions"):
            # A caption at a time: all of them may be larger than memory.
            return torch.stack([_sketched(each).to(self.device) for each in self.differences], dim=1)


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
class Measures:
    """Multi-scale SSIM of captions' noise differences.

    Attributes:
        own: to the caption's own unsuppressed prediction on the same seed, [P, S]; [0, S] for ordinary ones.
        resemblance: to the nearest of all memorized captions' unsuppressed predictions on the same seed, [P, S].
        nearest: which one that is, [P, S].
        agreement: of the caption's seeds of one timestep with each other, the mean of all pairs, [P, S].
    """

    own: Tensor
    resemblance: Tensor
    nearest: Tensor
    agreement: Tensor


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


def measure(views: Views, memorized: Views, betas: Sequence[float]) -> Measures:
    """Compare captions' predictions with those of all memorized captions, and the seeds with each other.

    Args:
        views: under a mask.
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    places = {prompt: place for place, prompt in enumerate(memorized.prompts)}
    return _joined(
        measure_one(places.get(prompt), differences.to(views.device), memorized, betas)
        for prompt, differences in zip(views.prompts, views.differences, strict=True)
    )


@named_shortage(_COMPARING)
def measure_one(position: int | None, differences: Tensor, memorized: Views, betas: Sequence[float]) -> Measures:
    """How one caption measures under a mask; the first dimension of all is 1.

    Args:
        position: of the caption in the memorized ones; None for an ordinary one.
        differences: its noise differences under the mask [S, channels, height, width].
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    own = torch.zeros(0, len(differences))
    if position is not None:
        own = _compare(differences, memorized.differences[position].to(differences.device), betas)[None]
    resemblance, nearest = _nearest(differences, memorized, betas)
    agreement = _agreement(differences, memorized.seeds.timesteps, betas)
    return Measures(own, resemblance[None], nearest[None], agreement[None])


def measure_under(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    memorized: Views,
    neurons: Collection[Neuron],
    log: LineLog | None = None,
) -> Measures:
    """How captions measure with neurons suppressed; one sample pass a caption and seed.

    Some captions are predicted at a time. What a log holds is not predicted again.

    Args:
        predictor: the model.
        prompts: texts, memorized or ordinary ones.
        memorized: the memorized captions, nothing suppressed.
        neurons: what is suppressed.
        log: where the measures are kept as they come.
    """
    betas = predictor.settings.ssim_betas
    name = None
    if log is not None:
        # What is taken in the neurons' place depends on the captions that are held, too.
        mask = predictor.in_weights(NeuronMask.from_neurons(neurons, predictor.sizes))
        name = f"{mask.digest} {predictor.scale}"
    known = {record["prompt"]: record for record in log or () if record["mask"] == name}
    places = {prompt: place for place, prompt in enumerate(memorized.prompts)}
    waiting = [prompt for prompt in prompts if prompt not in known]
    for start in range(0, len(waiting), predictor.batch_size):
        group = waiting[start : start + predictor.batch_size]
        predicted = differences_of(predictor, predictor.encode(group), memorized.seeds, neurons)
        for prompt, differences in zip(group, predicted, strict=True):
            found = measure_one(places.get(prompt), differences, memorized, betas)
            known[prompt] = {"mask": name, "prompt": prompt}
            known[prompt] |= {each.name: getattr(found, each.name).tolist() for each in fields(found)}
            if log is not None:
                log.append(known[prompt])
    return _joined(
        Measures(**{each.name: torch.tensor(known[prompt][each.name]) for each in fields(Measures)})
        for prompt in prompts
    )


def _joined(rows: Iterable[Measures]) -> Measures:
    rows = list(rows)
    return Measures(**{each.name: torch.cat([getattr(row, each.name) for row in rows]) for each in fields(Measures)})


def _agreement(differences: Tensor, timesteps: Tensor, betas: Sequence[float]) -> Tensor:
    """Mean similarity of a caption's seeds of the same timestep, [S]; -1 where a seed is alone."""
    found = torch.full((len(timesteps),), -1.0)
    for timestep in timesteps.unique():
        there = timesteps == timestep
        if int(there.sum()) > 1:
            found[there] = memorization_scores(differences[None, there], betas)[0].values.mean()
    return found


def _nearest(differences: Tensor, memorized: Views, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The highest similarity to any memorized caption on the same seed, and which one that is, both [S].

    Similarities are taken with those alone whose sketches are most alike: a corpus of 500 would else cost 500 of them
    a seed.
    """
    columns = torch.arange(len(differences))
    likely = most_alike(differences, memorized, columns, _LIKELY)
    others = memorized.differences[likely, columns].to(differences.device)
    compared = _compare(differences.expand_as(others).flatten(0, 1), others.flatten(0, 1), betas)
    highest = compared.unflatten(0, likely.shape).max(dim=0)
    return highest.values, likely[highest.indices, columns]


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


def _compare(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """Similarity of noise differences [batch, ...] with as many others, [batch], on the CPU."""

    def compare(part: slice) -> Tensor:
        return similarity(a[part], b[part], betas).cpu()

    return torch.cat(list(in_parts(compare, len(a), _AT_ONCE, _COMPARING)))
