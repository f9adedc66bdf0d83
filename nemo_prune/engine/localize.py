"""Find the neurons that make prompts give their training images back (Alg. 2 to 4 of the paper)."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Literal

from torch import Tensor

from nemo_prune.engine.activations import ActivationStatistics
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.memo import Detected, Memo
from nemo_prune.engine.pool import Asked, Finished, Pool, Questions
from nemo_prune.engine.preserve import Preserve
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.search import SearchOptions, SearchResult, search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.engine.similarity import joint_reach
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings

Status = Literal["localized", "not_memorized", "unresolved"]
# Prompts that are searched side by side at most: tensors and sets are in memory, two megabytes each for SD v1-4.
_MOST_RUNNING = 512


@dataclass(frozen=True)
class PromptLocalization:
    """What was found for one prompt.

    Attributes:
        prompt: its text.
        status: ``localized``; ``not_memorized``: no seed was kept; ``unresolved``: the selection ran
            out before the score reached the threshold.
        score: its memorization score.
        kept_seeds: positions of the seeds that agree with another one.
        candidates: the initial set.
        neurons: the refined set, a part of the candidates; empty where an unresolved prompt's was not wanted.
        candidates_score: the highest suppressed similarity that was seen under the initial set; not
            every seed need have been tried. None without a set.
        neurons_score: the highest suppressed similarity under the refined set, over all kept seeds.
        theta: the cut on |z| that gave the candidates.
        k: how many of the most active neurons of each layer are among them.
        margin: the smallest distance of any similarity from the threshold that decided about it.
        silenced_by_others: whether other prompts' neurons silence it, so that it needs none of its own.
        fell_back: whether the scores were not monotone, so that every set had to be tried in turn.
        spare: neurons of the refined set that could be spared alone; for all others it is proven that they can't.
        beyond_reach: whether even everything suppressed does not bring it under the threshold, so that no neurons
            of these layers can.
        sample_passes: latents that went through the U-Net for it.
        seconds: its share of the wall time.
    """

    prompt: str
    status: Status
    score: float
    kept_seeds: tuple[int, ...] = ()
    candidates: tuple[Neuron, ...] = ()
    neurons: tuple[Neuron, ...] = ()
    candidates_score: float | None = None
    neurons_score: float | None = None
    theta: float | None = None
    k: int | None = None
    margin: float | None = None
    silenced_by_others: bool = False
    fell_back: bool = False
    spare: tuple[Neuron, ...] = ()
    beyond_reach: bool = False
    sample_passes: int = 0
    seconds: float = 0.0

    @property
    def is_memorized(self) -> bool:
        """Whether the model memorizes the prompt, be it resolved or not."""
        return self.status != "not_memorized"


@dataclass(frozen=True)
class Localizer:
    """What a localization works with.

    Attributes:
        scorer: the model, with the settings of the localization.
        calibration: the usual activations.
        threshold: tau.
        preserve: departs from the paper in favour of ordinary captions; None follows it.
        refine_unresolved: whether sets of unresolved prompts are wanted, and so refined.
        check_way: whether the sets that a refinement jumps over are asked about too, see
            :class:`~nemo_prune.engine.search.SearchOptions`.
        memo: what is known already.
    """

    scorer: Scorer
    calibration: Calibration
    threshold: float
    preserve: Preserve | None = None
    refine_unresolved: bool = False
    check_way: bool = False
    memo: Memo = field(default_factory=Memo)

    @property
    def batch_size(self) -> int:
        """Latents that go through the U-Net at once."""
        return self.scorer.predictor.batch_size

    @cached_property
    def reach(self) -> float:
        """How far below the similarity over all seeds that of a seed alone may be."""
        predictor = self.scorer.predictor
        if predictor.settings.data_range != "joint":
            return 0.0
        return joint_reach(*predictor.initial_latents().shape[-2:])

    @cached_property
    def everything(self) -> frozenset[Neuron]:
        """All neurons of the layers."""
        sizes = self.scorer.predictor.sizes
        return frozenset(Neuron(layer, index) for layer, size in sizes.items() for index in range(size))

    def answer(self, asked: Sequence[Asked]) -> list[float]:
        """Answers to trials; what is known is not asked again."""
        answers = self.memo.known(asked)
        unknown = [pair for pair, answer in zip(asked, answers, strict=True) if answer is None]
        if not unknown:
            return answers
        found = self.scorer.answer(unknown)
        self.memo.learn(unknown, found)
        new = iter(found)
        return [next(new) if answer is None else answer for answer in answers]

    def detect(self, prompts: Sequence[str]) -> list[Detected]:
        """Prompts with their kept seeds (Alg. 1), those that are kept from before and those that are scored now."""
        latents = self.scorer.predictor.initial_latents()
        known = {prompt: self.memo.recall(prompt, latents) for prompt in prompts}
        waiting = [prompt for prompt in known if known[prompt] is None]
        at_once = self.scorer.prompts_at_once
        for start in range(0, len(waiting), at_once):
            for detected in detect(self.scorer, waiting[start : start + at_once], self.threshold):
                known[detected.scored.prompt] = detected
                if detected.kept_seeds:
                    self.memo.keep(detected)
        return [known[prompt] for prompt in prompts]

    def pool(self, suppressed: frozenset[Neuron] = frozenset()) -> Pool:
        """For searches side by side.

        Args:
            suppressed: what is suppressed beside what they ask about.
        """

        def answer(asked: Sequence[Asked]) -> list[float]:
            # Here, because a batch's sets are few: a corpus' mask in all that are asked about would fill the memory.
            joined = {neurons: neurons | suppressed for neurons in {trial.neurons for _, trial in asked}}
            return self.answer([(scored, trial._replace(neurons=joined[trial.neurons])) for scored, trial in asked])

        return Pool(answer if suppressed else self.answer, lambda: self.scorer.sample_passes)


def count_statuses(localizations: Sequence[PromptLocalization]) -> dict[str, int]:
    """How many prompts have each status, also where it is none."""
    statuses = [each.status for each in localizations]
    return {status: statuses.count(status) for status in ("localized", "not_memorized", "unresolved")}


def select_candidates(
    activations: Mapping[str, Tensor], z_scores: Mapping[str, Tensor], theta: float, k: int
) -> tuple[Neuron, ...]:
    """Neurons with unusual or with the highest activation (Alg. 2 and 3).

    Args:
        activations: dotted module name -> [out_features], of one prompt.
        z_scores: the same in standard deviations from the usual.
        theta: cut on |z|.
        k: how many of the most active neurons of each layer are added.

    Returns:
        Layer by layer: |z| > theta by index, then the k most active, the most active first. A neuron
        that is both stands at its last place: there the refinement's real test comes.
    """
    candidates = []
    for name, activation in activations.items():
        unusual = (z_scores[name].abs() > theta).nonzero().flatten().tolist()
        most_active = activation.topk(min(k, len(activation))).indices.tolist()
        ordered = [index for index in unusual if index not in most_active] + most_active
        candidates += [Neuron(name, index) for index in ordered]
    return tuple(candidates)


def candidate_schedule(
    activations: Mapping[str, Tensor],
    statistics: ActivationStatistics,
    settings: LocalizationSettings,
    suppressed: Collection[Neuron] = (),
) -> list[Candidates]:
    """The candidates as the cut falls, each set a part of the next (Alg. 3).

    Args:
        activations: dotted module name -> [out_features], of one prompt.
        statistics: what is usual.
        settings: where theta starts, falls by and ends.
        suppressed: neurons that are no candidates any more.
    """
    z_scores = statistics.z_scores(activations)
    schedule: list[Candidates] = []
    theta = settings.theta
    while not schedule or theta >= settings.theta_min:
        neurons = select_candidates(activations, z_scores, theta, len(schedule))
        schedule.append(
            Candidates(theta, len(schedule), tuple(neuron for neuron in neurons if neuron not in suppressed))
        )
        theta -= settings.theta_step
    return schedule


def localize_prompts(
    localizer: Localizer, prompts: Sequence[str], suppressed: Collection[Neuron] = ()
) -> Iterator[PromptLocalization]:
    """Find the memorization neurons of prompts, of those that are memorized at all (Sec. 3).

    Many prompts are searched side by side, each trial a sample of a batch.

    Args:
        localizer: the model and what is usual for it.
        prompts: the texts.
        suppressed: what stays suppressed throughout: what is found comes on top of it. Prompts that were detected
            before count no passes for it again.

    Yields:
        One result per prompt, in the order in which they are finished.

    Raises:
        ModelError: the model predicts NaN or infinity.
    """
    waiting, suppressed = list(prompts)[::-1], frozenset(suppressed)
    pool: Pool[Detected, SearchResult] = localizer.pool(suppressed)
    # One set for all prompts.
    everything = localizer.everything - suppressed
    while waiting or len(pool):
        while waiting and len(pool) < _MOST_RUNNING:
            group = [waiting.pop() for _ in range(min(len(waiting), localizer.scorer.prompts_at_once))]
            for detected in localizer.detect(group):
                if not detected.kept_seeds:
                    yield not_memorized(detected)
                    continue
                if suppressed:
                    detected = replace(detected, sample_passes=0, seconds=0.0)
                pool.add(detected, questions_of(localizer, detected, everything, suppressed))
        if len(pool):
            pool.step(localizer.batch_size)
        yield from map(localization_of, pool.finished())


def localize_prompt(localizer: Localizer, prompt: str) -> PromptLocalization:
    """Find the memorization neurons of one prompt; see :func:`localize_prompts`."""
    return next(localize_prompts(localizer, [prompt]))


def detect(scorer: Scorer, prompts: Sequence[str], threshold: float) -> list[Detected]:
    """Score prompts in one batch and keep the seeds that agree with another one (Alg. 1)."""
    began, passes_before = time.perf_counter(), scorer.sample_passes
    scored_prompts = scorer.score_prompts(prompts)
    kept_seeds = [scorer.kept_seeds(scored, threshold) for scored in scored_prompts]
    sample_passes = (scorer.sample_passes - passes_before) // len(prompts)
    seconds = (time.perf_counter() - began) / len(prompts)
    return [
        Detected(scored, kept, sample_passes, seconds) for scored, kept in zip(scored_prompts, kept_seeds, strict=True)
    ]


def not_memorized(detected: Detected) -> PromptLocalization:
    """The result for a prompt without a kept seed."""
    return PromptLocalization(
        detected.scored.prompt,
        "not_memorized",
        detected.scored.memorization.score,
        sample_passes=detected.sample_passes,
        seconds=detected.seconds,
    )


def questions_of(
    localizer: Localizer, detected: Detected, everything: frozenset[Neuron], suppressed: frozenset[Neuron]
) -> Questions[SearchResult]:
    """The search for a prompt's neurons, as questions that name the prompt.

    Args:
        localizer: what is usual, and how to search.
        detected: the prompt.
        everything: all that can be suppressed.
        suppressed: what stays suppressed throughout, and is in no set that is asked about.
    """
    predictor, preserve, scored = localizer.scorer.predictor, localizer.preserve, detected.scored
    search = search_neurons(
        candidate_schedule(
            localizer.scorer.activations(scored), localizer.calibration.statistics, predictor.settings, suppressed
        ),
        detected.kept_seeds,
        localizer.threshold,
        list(predictor.sizes)[:: -1 if predictor.settings.layers_backwards else 1],
        SearchOptions(
            costs=preserve.costs if preserve and preserve.strength else None,
            widening=preserve.strength if preserve else 0.0,
            everything=everything,
            refine_unresolved=localizer.refine_unresolved,
            check_way=localizer.check_way,
            reach=localizer.reach,
        ),
    )
    answers = None
    while True:
        try:
            trials = search.send(answers)
        except StopIteration as finished:
            return finished.value
        answers = yield [(scored, trial) for trial in trials]


def localization_of(finished: Finished[Detected, SearchResult]) -> PromptLocalization:
    """What is kept of a finished search."""
    result, detected = finished.result, finished.key
    return PromptLocalization(
        prompt=detected.scored.prompt,
        status="localized" if result.resolved else "unresolved",
        score=detected.scored.memorization.score,
        kept_seeds=detected.kept_seeds,
        candidates=result.selected.neurons,
        neurons=result.neurons,
        candidates_score=result.selected_score,
        neurons_score=result.neurons_score,
        theta=result.selected.theta,
        k=result.selected.k,
        margin=result.margin if isfinite(result.margin) else None,
        fell_back=result.fell_back,
        spare=result.spare,
        beyond_reach=result.beyond_reach,
        sample_passes=detected.sample_passes + finished.sample_passes,
        seconds=detected.seconds + finished.seconds,
    )
