"""What a candidate still can do: noise predictions and images of ordinary captions, beside what differs anyway."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from nemo_prune.engine.activations import neuron_activations
from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.layers import find_text_projections
from nemo_prune.mask import NeuronMask
from nemo_prune.proof.changed_rows import ChangedRows
from nemo_prune.proof.cost import matched_random_mask
from nemo_prune.proof.drawing import BASE, CANDIDATE, Gallery, encode, quick_latents
from nemo_prune.proof.intervals import Equivalence, Spread
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.settings import LocalizationSettings

PRECISION, RANDOM = "another precision", "as many random neurons"
_PLACES = (0.02, 0.25, 0.5, 0.75, 0.96)
_SEEDS_PER_CAPTION = 2
# Ordinary captions that what stands in for random neurons is measured on.
_STAND_IN_CAPTIONS = 8


@dataclass(frozen=True)
class CaptionChange:
    """Change of the noise prediction of one caption.

    Attributes:
        relative_error: compared model -> one value per timestep: norm of the change over the base's.
        cosine: compared model -> one value per timestep.
        denoising_error: model -> one value per timestep: mean squared error against the noise that was added.
    """

    relative_error: Mapping[str, tuple[float, ...]]
    cosine: Mapping[str, tuple[float, ...]]
    denoising_error: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class NoiseChange:
    """Change of the noise prediction of many captions, the mean over them.

    Attributes:
        captions: how many.
        timesteps: from the noisiest.
        relative_error: compared model -> one value per timestep.
        cosine: compared model -> one value per timestep.
    """

    captions: int
    timesteps: tuple[int, ...]
    relative_error: Mapping[str, tuple[float, ...]]
    cosine: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, found: Sequence[CaptionChange], timesteps: Sequence[int]) -> "NoiseChange | None":
        """Bring captions together; None where there are none."""
        if not found:
            return None
        return cls(
            len(found),
            tuple(timesteps),
            _means([each.relative_error for each in found]),
            _means([each.cosine for each in found]),
        )

    def loss(self, model: str = CANDIDATE) -> float:
        """Mean relative error over the timesteps."""
        return mean(self.relative_error[model])


@dataclass(frozen=True)
class CaptionImages:
    """Images of one ordinary caption; similarities by the yardstick, one value per seed.

    Attributes:
        to_base: the candidate's to the base's of the same seed.
        random_to_base: under as many random neurons; empty where there is no mask to match.
        between_seeds: the base's to the base's of another seed.
        parts_of_base: of the most alike tiles of the base's images and any training image: the control of copied parts.
        nearest_of_base: of the base's images to the nearest training image: the control of copies.
    """

    to_base: tuple[float, ...]
    random_to_base: tuple[float, ...]
    between_seeds: tuple[float, ...]
    parts_of_base: tuple[float, ...]
    nearest_of_base: tuple[float, ...]


@dataclass(frozen=True)
class Utility:
    """What a candidate still can do.

    Attributes:
        held_out: change on captions held out from calibration.
        neighbours: change on ordinary captions that share most words with memorized ones.
        loss: mean relative change of the noise prediction on the held-out captions, over captions and timesteps.
        equivalence: whether the denoising error on held-out captions, relative to the base's, is the same within the
            margin.
        images_to_base: similarity of images of held-out captions to the base's, same seed.
        images_random: the same under as many random neurons; None without a mask to match.
        images_between_seeds: similarity of the base's images of two seeds: what is not to be expected anyway.
        alignment: caption and image by CLIP, base and candidate; None without its weights.
        alignment_equivalence: whether it is the same within the margin.
        distances: FID and KID of the candidate's images to the base's; None without a network that describes them.
    """

    held_out: NoiseChange
    neighbours: NoiseChange | None
    loss: float
    equivalence: Equivalence | None
    images_to_base: Spread | None = None
    images_random: Spread | None = None
    images_between_seeds: Spread | None = None
    alignment: Mapping[str, Spread] | None = None
    alignment_equivalence: Equivalence | None = None
    distances: Mapping[str, float] | None = None


def neighbours(ordinary: Sequence[str], memorized: Sequence[str], number: int) -> list[str]:
    """The ordinary captions that share most of their words with a memorized one, the nearest first."""
    theirs = [_words(text) for text in memorized]
    nearness = {
        text: max((len(mine & other) / len(mine | other) for other in theirs), default=0.0)
        for text in ordinary
        if (mine := _words(text))
    }
    near = [text for text in sorted(nearness, key=lambda text: (-nearness[text], text)) if nearness[text] > 0]
    return near[:number]


def split_ordinary(ordinary: Sequence[str], memorized: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    """Ordinary captions for two tests: those like any other, and neighbours of the memorized ones.

    Args:
        ordinary: the captions, held out from calibration.
        memorized: the memorized ones.
        number: of each, at most.
    """
    near = neighbours(ordinary, memorized, number)
    apart = [text for text in ordinary if text not in near]
    return list((apart or ordinary)[:number]), near


class NoiseJudge:
    """Compares the noise predictions of models on the same noisy latents.

    Args:
        base: the base.
        candidate: the candidate.
        rows: where they differ; as many random neurons are a baseline where that is a mask.
        ordinary: captions that usual activations are taken from.
        seed: of latents and random neurons.

    Attributes:
        timesteps: from the noisiest.
    """

    def __init__(
        self,
        base: StableDiffusionPipeline,
        candidate: StableDiffusionPipeline,
        rows: ChangedRows,
        ordinary: Sequence[str],
        seed: int,
    ) -> None:
        self._base, self._seed = base, seed
        settings = LocalizationSettings(projections="both", seed=seed)
        self._predictors = {
            BASE: NoisePredictor(base, settings),
            CANDIDATE: NoisePredictor(candidate, settings),
            PRECISION: NoisePredictor(_in_another_precision(base), settings),
        }
        schedule = self._predictors[BASE].timesteps
        self.timesteps = tuple(schedule[round(place * (len(schedule) - 1))] for place in _PLACES)
        self.random = random_rows(base, rows, ordinary, seed) if rows.are_a_mask else None
        self._scheduler = DDIMScheduler.from_config(base.scheduler.config)

    @property
    def unets(self) -> list[torch.nn.Module]:
        """The U-Nets whose passes count."""
        return [predictor.pipe.unet for predictor in self._predictors.values()]

    @property
    def passes(self) -> int:
        """Passes that one caption costs."""
        models = len(self._predictors) + (self.random is not None)
        return _SEEDS_PER_CAPTION * (10 + len(self.timesteps) * models)

    def change(self, text: str) -> CaptionChange:
        """Change of one caption's noise prediction, on images that the base draws quickly."""
        seeds = [self._seed + each for each in range(_SEEDS_PER_CAPTION)]
        clean = quick_latents(self._base, text, seeds)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(self._seed)).to(clean.device)
        predicted = [self._predict(text, clean, noise, timestep) for timestep in self.timesteps]
        compared = [name for name in predicted[0] if name != BASE]
        return CaptionChange(
            {name: tuple(_relative_error(each[name], each[BASE]) for each in predicted) for name in compared},
            {name: tuple(_cosine(each[name], each[BASE]) for each in predicted) for name in compared},
            {
                name: tuple(float((each[name] - noise.cpu()).square().mean()) for each in predicted)
                for name in predicted[0]
            },
        )

    def _predict(self, text: str, clean: Tensor, noise: Tensor, timestep: int) -> dict[str, Tensor]:
        noisy = self._scheduler.add_noise(clean, noise, torch.tensor([timestep]))
        found = {}
        for name, predictor in self._predictors.items():
            embeds = encode(predictor.pipe, text).expand(len(noisy), -1, -1)
            found[name] = _predicted(predictor, noisy, embeds, timestep)
        if self.random is not None:
            embeds = encode(self._base, text).expand(len(noisy), -1, -1)
            with apply_mask(self._base, self.random):
                found[RANDOM] = _predicted(self._predictors[BASE], noisy, embeds, timestep)
        return found


def random_rows(base: StableDiffusionPipeline, rows: ChangedRows, ordinary: Sequence[str], seed: int) -> NeuronMask:
    """As many random rows as differ, in the same layers, as active on ordinary captions, and other ones.

    Where the candidate's keep their means, or kept neurons stand in, it is the same for these; no caption is held.
    """
    layers = find_text_projections(base.unet, "both")
    embeds = torch.stack([encode(base, text) for text in ordinary[:64]])
    activation = {name: values.mean(dim=0) for name, values in neuron_activations(layers, embeds).items()}
    random = matched_random_mask(rows.mask, activation, seed)
    if not rows.mask.behind:
        return random
    predictor = NoisePredictor(base, LocalizationSettings(projections="value"))
    usual = attended_moments(predictor, ordinary[:_STAND_IN_CAPTIONS])
    return Compensation(usual, {} if rows.mask.combinations else None).in_weights(random, base.unet)


def caption_images(
    gallery: Gallery, base: StableDiffusionPipeline, random: NeuronMask | None, judge: ReplicationJudge, text: str
) -> CaptionImages:
    """Compare one ordinary caption's images.

    Args:
        gallery: draws and keeps them.
        base: the base.
        random: as many random rows, to compare with; None where there is no mask to match.
        judge: has the yardstick and the training images.
        text: the caption.
    """
    similarity = judge.similarity
    ours, theirs = gallery.images(BASE, text), gallery.images(CANDIDATE, text)
    described = similarity.describe(ours)
    to_base = similarity.compare(similarity.describe(theirs), described).diagonal()
    random_to_base: tuple[float, ...] = ()
    if random is not None:
        with apply_mask(base, random):
            drawn = gallery.images(RANDOM, text)
        random_to_base = tuple(similarity.compare(similarity.describe(drawn), described).diagonal().tolist())
    between = similarity.compare(described, described)
    return CaptionImages(
        tuple(to_base.tolist()),
        random_to_base,
        tuple(between[tuple(torch.triu_indices(*between.shape, offset=1))].tolist()),
        tuple(judge.parts(ours)),
        tuple(judge.nearest(ours)[0]),
    )


def denoising_equivalence(found: Sequence[CaptionChange], margin: float) -> Equivalence | None:
    """Whether the candidate denoises held-out images as well as the base, within a share of the base's error.

    The caption is the unit: its seeds are the same for both models, and its timesteps are averaged.
    """
    differences = [
        (mean(each.denoising_error[CANDIDATE]) - mean(each.denoising_error[BASE])) / mean(each.denoising_error[BASE])
        for each in found
    ]
    return Equivalence.of("denoising error, relative to the base's", differences, margin)


def _predicted(predictor: NoisePredictor, noisy: Tensor, embeds: Tensor, timestep: int) -> Tensor:
    return predictor.predict_each(noisy, embeds, [()] * len(noisy), len(noisy), timestep).cpu()


def _in_another_precision(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The same model in the half precision of its device; where it is in one already, in the other one."""
    cpu, half = pipe.unet.device.type == "cpu", (torch.bfloat16, torch.float16)
    other = half[0] if (cpu or pipe.unet.dtype == half[1]) and pipe.unet.dtype != half[0] else torch.float32
    if pipe.unet.dtype == torch.float32 and not cpu:
        other = half[1]
    components = {**pipe.components, "unet": copy.deepcopy(pipe.unet).to(other)}
    another = StableDiffusionPipeline(**components, requires_safety_checker=False)
    another.set_progress_bar_config(disable=True)
    return another


def _relative_error(values: Tensor, base: Tensor) -> float:
    values, base = values.flatten(1), base.flatten(1)
    return float(((values - base).norm(dim=1) / base.norm(dim=1)).mean())


def _cosine(values: Tensor, base: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(values.flatten(1), base.flatten(1)).mean())


def _means(found: Sequence[Mapping[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    return {
        name: tuple(mean(values) for values in zip(*(each[name] for each in found), strict=True)) for name in found[0]
    }


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))
