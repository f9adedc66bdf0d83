"""When a memorized caption is gone, and not only silent; and when an ordinary one is called up."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.measures import Measures, measure, measure_under
from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.similarity import memorization_scores
from nemo_prune.engine.views import Seeds, Views, observe
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron

# Seed of latents that no search for a mask has seen.
FRESH_SEED = 3001
# By how many of the seeds' standard deviations their mean must stay under tau.
SPREADS = 2.0
# By how many deviations above the mean an ordinary caption resembles a memorized one, at most, on its highest seed.
USUAL_SPREADS = 3.0


@dataclass(frozen=True)
class Corpus:
    """What a mask is judged against; it is predicted once for all masks.

    Attributes:
        memorized: the memorized captions, nothing suppressed.
        ordinary: ordinary captions, nothing suppressed.
        emptied: how the memorized ones measure with everything suppressed.
        usual: how the ordinary ones measure with nothing suppressed.
        usual_emptied: how the ordinary ones measure with everything suppressed.
        thresholds: tau of every seed's timestep, [S].
        timestep: of the detection, at which a caption is to be silent.
        strictness: how far under its limits each memorized caption must stay, [P], where everything suppressed does.
        betas: exponents of the multi-scale SSIM.
    """

    memorized: Views
    ordinary: Views
    emptied: Measures
    usual: Measures
    usual_emptied: Measures
    thresholds: Tensor
    timestep: int
    strictness: Tensor
    betas: tuple[float, ...]

    @property
    def seeds(self) -> Seeds:
        """The seeds on which captions are judged."""
        return self.memorized.seeds

    @cached_property
    def own_limits(self) -> Tensor:
        """Up to what a memorized caption may be similar to itself before, [P, S]: tau, less its strictness.

        Not less than everything suppressed leaves, with a standard deviation over seeds; at the detection's timestep
        tau at most, which is what the paper asks for.
        """
        floor = self.emptied.own + self._deviations(self.emptied.own)
        floor = torch.where(self._of_detection, torch.minimum(floor, self.thresholds), floor)
        return torch.maximum(self.thresholds[None] - self.strictness[:, None], floor)

    @cached_property
    def usual_resemblance(self) -> Tensor:
        """What ordinary captions may resemble a memorized one by before anything is suppressed, [1, S].

        The mean over captions of their highest seed, plus three deviations. A caption is judged by its highest seed,
        and a corpus has hundreds: a limit for single seeds, or the highest of a few captions, is exceeded by chance.
        """
        highest = torch.stack([group.max(dim=1).values for group in self._of_same_timestep(self.usual.resemblance)])
        few = min(1, highest.shape[1] - 1)
        return (highest.mean(dim=1) + USUAL_SPREADS * highest.std(dim=1, correction=few))[None]

    @cached_property
    def resemblance_limits(self) -> Tensor:
        """Up to what a memorized caption may resemble one, [P, S]: as with everything suppressed, or as is usual.

        By a standard deviation over seeds more, so that a mask that is as good as everything suppressed passes.
        """
        floor = self.emptied.resemblance + self._deviations(self.emptied.resemblance)
        return torch.maximum(floor, self.usual_resemblance - self.strictness[:, None])

    @cached_property
    def spread_limits(self) -> Tensor:
        """Up to what the mean of a caption's seeds plus deviations may be similar to itself before, [P, S].

        Tau, or what everything suppressed leaves where that is higher: no mask can be asked for more. That, too, by a
        standard deviation more.
        """
        floor = torch.stack([spread(group) for group in self._of_same_timestep(self.emptied.own)], dim=1)
        return torch.maximum(self.own_limits, floor + self._deviations(self.emptied.own))

    @cached_property
    def ordinary_limits(self) -> Tensor:
        """Up to what an ordinary caption may do so, [N, S]: also as before anything was suppressed."""
        before = torch.maximum(self.usual_emptied.resemblance, self.usual.resemblance)
        return torch.maximum(before, self.usual_resemblance)

    @cached_property
    def agreement_limits(self) -> Tensor:
        """Up to what a caption's seeds may agree, [P, S]: as with everything suppressed, or as ordinary captions do."""
        return torch.maximum(self.emptied.agreement, self.thresholds[None] - self.strictness[:, None])

    def is_silent(self, own: Tensor) -> bool:
        """Whether a caption that is so similar to itself before, [S], is silent as the paper asks for."""
        return bool((own <= self.thresholds)[self._of_detection].all())

    @property
    def _of_detection(self) -> Tensor:
        """Which seeds are of the detection's timestep, [S]."""
        return self.seeds.timesteps == self.timestep

    def _deviations(self, values: Tensor) -> Tensor:
        """The standard deviation of a caption's seeds of the same timestep, [P, S]; 0 where a seed is alone."""
        groups = self._of_same_timestep(values)
        return torch.stack([group.std(dim=1, correction=min(1, group.shape[1] - 1)) for group in groups], dim=1)

    def _of_same_timestep(self, values: Tensor) -> list[Tensor]:
        """For every seed the values [P, S] of all that share its timestep, itself among them."""
        return [values[:, self.seeds.timesteps == each] for each in self.seeds.timesteps]


@dataclass(frozen=True)
class Verdict:
    """One caption under a mask. A margin is the distance to what is allowed; below 0 it is exceeded.

    Attributes:
        prompt: its text.
        similarity: the suppressed similarity, the highest of all seeds; None for an ordinary caption.
        is_silent: whether every seed of the detection's timestep is at most at tau, which is all that the paper asks
            for.
        similarity_margin: how far the seeds, and their mean plus two standard deviations, are under tau at least.
        resemblance: to the nearest memorized caption, on the seed where it exceeds its limit most.
        nearest: that caption.
        resemblance_margin: its limit minus that.
        agreement: of the seeds with each other, the highest of all timesteps.
        agreement_margin: how far that is under its limit; None for an ordinary caption.
    """

    prompt: str
    similarity: float | None
    is_silent: bool
    similarity_margin: float | None
    resemblance: float
    nearest: str
    resemblance_margin: float
    agreement: float
    agreement_margin: float | None

    @property
    def margins(self) -> dict[str, float]:
        """Why it would not be gone -> how far it is from that."""
        margins = {
            "similar to its own unsuppressed prediction": self.similarity_margin,
            "resembles a memorized caption": self.resemblance_margin,
            "its seeds agree": self.agreement_margin,
        }
        return {reason: margin for reason, margin in margins.items() if margin is not None}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not gone; empty where it is, or where an ordinary caption is as before."""
        # Written so that NaN does not pass.
        return tuple(reason for reason, margin in self.margins.items() if not margin >= 0)

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it shows in its noise predictions; images are judged apart."""
        return not self.reasons


def gather_corpus(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    seeds: Seeds,
    threshold: float,
    strictness: Mapping[str, float] | None = None,
    log: LineLog | None = None,
    detected: Callable[[Sequence[str]], Sequence[ScoredPrompt]] | None = None,
    folder: Path | None = None,
) -> Corpus:
    """Predict what masks are judged against: two sample passes a caption and seed.

    Args:
        predictor: the model.
        prompts: memorized captions.
        ordinary: ordinary captions; at other timesteps than the predictor's they give tau as well.
        seeds: initial latents and timesteps; those of the detection, and fresh ones.
        threshold: tau at the predictor's own timestep.
        strictness: memorized caption -> how far under its limits it must stay; 0 unless given.
        log: where measures are kept as they come.
        detected: gives memorized captions as they were scored on the first of the seeds: that is not predicted again.
        folder: where is kept what is predicted with nothing suppressed.
    """
    everything, betas = all_neurons(predictor.sizes), predictor.settings.ssim_betas
    memorized = observe(predictor, prompts, seeds, detected=detected, folder=folder and folder / "memorized")
    usual = observe(predictor, ordinary, seeds, folder=folder and folder / "ordinary")
    thresholds = torch.full((len(seeds),), threshold)
    for timestep in set(seeds.timesteps.tolist()) - {predictor.timestep}:
        there = seeds.timesteps == timestep
        seen = usual.differences[:, there].to(usual.device)
        pairs = torch.cat([each.values for each in memorization_scores(seen, betas)])
        thresholds[there] = float(pairs.mean() + predictor.settings.threshold_num_std * pairs.std())
    return Corpus(
        memorized=memorized,
        ordinary=usual,
        emptied=measure_under(predictor, prompts, memorized, everything, log),
        usual=measure(usual, memorized, betas),
        usual_emptied=measure_under(predictor, ordinary, memorized, everything, log),
        thresholds=thresholds,
        timestep=predictor.timestep,
        strictness=torch.tensor([(strictness or {}).get(prompt, 0.0) for prompt in prompts]),
        betas=betas,
    )


def judge(
    predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron], log: LineLog | None = None
) -> list[Verdict]:
    """Judge the memorized captions under a mask, one sample pass a caption and seed that a log does not hold."""
    return judged_by(measure_under(predictor, corpus.memorized.prompts, corpus.memorized, neurons, log), corpus)


def judged_by(measures: Measures, corpus: Corpus) -> list[Verdict]:
    """The verdicts on all memorized captions, by how they measure under a mask."""
    return [verdict(position, measures, corpus, position) for position in range(len(corpus.memorized.prompts))]


def judge_ordinary(
    predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron], log: LineLog | None = None
) -> list[Verdict]:
    """Judge whether a mask calls up memorized pictures for ordinary captions, with as many passes."""
    measures = measure_under(predictor, corpus.ordinary.prompts, corpus.memorized, neurons, log)
    found = []
    for position, prompt in enumerate(corpus.ordinary.prompts):
        margins = corpus.ordinary_limits[position] - measures.resemblance[position]
        seed = int(margins.argmin())
        found.append(
            Verdict(
                prompt=prompt,
                similarity=None,
                is_silent=True,
                similarity_margin=None,
                resemblance=float(measures.resemblance[position, seed]),
                nearest=corpus.memorized.prompts[int(measures.nearest[position, seed])],
                resemblance_margin=float(margins[seed]),
                agreement=float(measures.agreement[position].max()),
                agreement_margin=None,
            )
        )
    return found


def verdict(position: int, measures: Measures, corpus: Corpus, row: int = 0) -> Verdict:
    """The verdict on a memorized caption.

    Args:
        position: of the caption in the corpus.
        measures: how it measures under a mask.
        corpus: what it is judged against.
        row: of the caption in the measures.
    """
    own, margins = measures.own[row], corpus.resemblance_limits[position] - measures.resemblance[row]
    seed = int(margins.argmin())
    return Verdict(
        prompt=corpus.memorized.prompts[position],
        similarity=float(own.max()),
        is_silent=corpus.is_silent(own),
        similarity_margin=_similarity_margin(own, corpus, position),
        resemblance=float(measures.resemblance[row, seed]),
        nearest=corpus.memorized.prompts[int(measures.nearest[row, seed])],
        resemblance_margin=float(margins[seed]),
        agreement=float(measures.agreement[row].max()),
        agreement_margin=float((corpus.agreement_limits[position] - measures.agreement[row]).min()),
    )


def spread(own: Tensor) -> Tensor:
    """What a seed that was not looked at may reach: the seeds' mean plus two standard deviations, [P] of [P, S]."""
    if own.shape[1] < 2:
        return own.mean(dim=1)
    return own.mean(dim=1) + SPREADS * own.std(dim=1)


def _similarity_margin(own: Tensor, corpus: Corpus, position: int) -> float:
    """How far every seed, and what those of its timestep may reach, is under its limit."""
    timesteps = corpus.seeds.timesteps
    margins = [(corpus.own_limits[position] - own).min()]
    for timestep in timesteps.unique():
        there = timesteps == timestep
        margins.append((corpus.spread_limits[position, there] - spread(own[None, there])).min())
    return float(torch.stack(margins).min())
