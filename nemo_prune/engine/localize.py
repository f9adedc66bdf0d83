"""Find the neurons that make prompts give their training images back (Alg. 2 to 4 of the paper)."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

from torch import Tensor

from nemo_prune.engine.activations import ActivationStatistics, neuron_activations
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.preserve import Preserve
from nemo_prune.engine.scorer import ScoredPrompt, Scorer
from nemo_prune.engine.search import SearchResult, search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.engine.trials import Trial
from nemo_prune.facts import Status
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings


@dataclass(frozen=True)
class PromptLocalization:
    """What was found for one prompt.

    Attributes:
        prompt: its text.
        status: ``localized``; ``not_memorized``: no seed was kept; ``unresolved``: the selection ran
            out before the score reached the threshold, the neurons are the best that was found.
        score: its memorization score.
        kept_seeds: positions of the seeds that agree with another one.
        candidates: the initial set.
        neurons: the refined set, a part of the candidates.
        candidates_score: the highest suppressed similarity that was seen under the initial set, on the
            seeds that were tried. None without a set.
        neurons_score: the highest suppressed similarity under the refined set, over all kept seeds.
        theta: the cut on |z| that gave the candidates.
        k: number of the most active neurons of each layer among them.
        margin: the smallest distance of any similarity from the threshold it was compared with.
        silenced_by_others: whether other prompts' neurons silence it, so it needs none of its own.
        fell_back: whether the scores were not monotone, so every set had to be tried in turn.
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
    sample_passes: int = 0
    seconds: float = 0.0

    @property
    def is_memorized(self) -> bool:
        """Whether the model memorizes the prompt, resolved or not."""
        return self.status != "not_memorized"


@dataclass(frozen=True)
class Localizer:
    """What a localization works with.

    Attributes:
        scorer: the model, with the settings of the localization.
        calibration: the usual activations.
        threshold: tau.
        preserve: how to spare ordinary captions, beyond the paper; None follows the paper.
    """

    scorer: Scorer
    calibration: Calibration
    threshold: float
    preserve: Preserve | None = None


def count_statuses(localizations: Sequence[PromptLocalization]) -> dict[str, int]:
    """How many prompts have each status, zeros included."""
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
        that is both keeps its last place, because the refinement's real test comes there.
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
        settings: where theta starts, by how much it falls, and where it ends.
        suppressed: neurons that are no longer candidates.
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


def localize_prompts(localizer: Localizer, prompts: Sequence[str]) -> Iterator[PromptLocalization]:
    """Find the memorization neurons of those prompts that are memorized (Sec. 3).

    As many prompts as fit into a batch are searched side by side; each trial is one sample of the batch.

    Args:
        localizer: the model and what is usual for it.
        prompts: the texts.

    Yields:
        One result per prompt, in the order in which they are finished.

    Raises:
        ModelError: the model predicts NaN or infinity.
    """
    scorer = localizer.scorer
    waiting = list(prompts)[::-1]
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < scorer.predictor.batch_size:
            group = [waiting.pop() for _ in range(min(len(waiting), scorer.prompts_at_once))]
            for detected in detect(scorer, group, localizer.threshold):
                if detected.kept_seeds:
                    running.append(_Running(localizer, detected))
                else:
                    yield detected.not_memorized()
        yield from _take_a_step(scorer, running)


def localize_prompt(localizer: Localizer, prompt: str) -> PromptLocalization:
    """Find the memorization neurons of one prompt; see :func:`localize_prompts`."""
    return next(localize_prompts(localizer, [prompt]))


def localize_on_top(localizer: Localizer, detected: "Detected", suppressed: Collection[Neuron]) -> PromptLocalization:
    """Find the neurons that a prompt needs beyond those that are suppressed already.

    Args:
        localizer: the model and what is usual for it.
        detected: a memorized prompt.
        suppressed: what stays suppressed throughout. It must not be enough by itself.
    """
    running = [_Running(localizer, detected, frozenset(suppressed))]
    # Most steps ask a single trial; filling up a larger batch would be wasted.
    while not (finished := list(_take_a_step(localizer.scorer, running, batch_size=1))):
        pass
    return finished[0]


@dataclass(frozen=True)
class Detected:
    """A prompt whose seeds were compared (Alg. 1).

    Attributes:
        scored: its seeds with nothing suppressed.
        kept_seeds: positions of the seeds that agree with another one; without any the prompt is not memorized.
        sample_passes: latents that went through the U-Net for it.
        seconds: its share of the wall time.
    """

    scored: ScoredPrompt
    kept_seeds: tuple[int, ...]
    sample_passes: int
    seconds: float

    def not_memorized(self) -> PromptLocalization:
        """The result for a prompt without a kept seed."""
        return PromptLocalization(
            self.scored.prompt,
            "not_memorized",
            self.scored.memorization.score,
            sample_passes=self.sample_passes,
            seconds=self.seconds,
        )


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


class _Running:
    """A prompt whose search waits for the answers to its trials."""

    def __init__(self, localizer: Localizer, detected: Detected, suppressed: frozenset[Neuron] = frozenset()) -> None:
        predictor, preserve = localizer.scorer.predictor, localizer.preserve
        activations = {
            name: values[0]
            for name, values in neuron_activations(predictor.layers, detected.scored.prompt_embeds[None]).items()
        }
        self.detected = detected
        self.trials: list[Trial] = []
        self.result: SearchResult | None = None
        self._suppressed = suppressed
        self._sample_passes, self._seconds = detected.sample_passes, detected.seconds
        self._search = search_neurons(
            candidate_schedule(activations, localizer.calibration.statistics, predictor.settings, suppressed),
            detected.kept_seeds,
            localizer.threshold,
            list(predictor.layers)[:: -1 if predictor.settings.layers_backwards else 1],
            preserve.costs if preserve else None,
            preserve.strength if preserve else 0.0,
        )
        self.advance(None, 0, 0.0)

    def advance(self, answers: list[float] | None, sample_passes: int, seconds: float) -> None:
        """Go on to the next trials, or to the result."""
        self._sample_passes += sample_passes
        self._seconds += seconds
        try:
            trials = self._search.send(answers)
            self.trials = [trial._replace(neurons=trial.neurons | self._suppressed) for trial in trials]
        except StopIteration as finished:
            self.trials, self.result = [], finished.value

    def localization(self) -> PromptLocalization:
        """What is kept of a finished search."""
        result, scored = self.result, self.detected.scored
        return PromptLocalization(
            prompt=scored.prompt,
            status="localized" if result.resolved else "unresolved",
            score=scored.memorization.score,
            kept_seeds=self.detected.kept_seeds,
            candidates=result.selected.neurons,
            neurons=result.neurons,
            candidates_score=result.selected_score,
            neurons_score=result.neurons_score,
            theta=result.selected.theta,
            k=result.selected.k,
            margin=result.margin if isfinite(result.margin) else None,
            fell_back=result.fell_back,
            sample_passes=self._sample_passes,
            seconds=self._seconds,
        )


def _take_a_step(
    scorer: Scorer, running: list[_Running], batch_size: int | None = None
) -> Iterator[PromptLocalization]:
    """Answer the trials of all searches together; those that end leave the list and are yielded."""
    asked = [(each.detected.scored, trial) for each in running for trial in each.trials]
    began, passes_before = time.perf_counter(), scorer.sample_passes
    similarities = iter(scorer.answer(asked, batch_size))
    passes, seconds = scorer.sample_passes - passes_before, time.perf_counter() - began
    for each in running:
        if each.result is None:
            share = len(each.trials) / len(asked)
            answers = list(islice(similarities, len(each.trials)))
            each.advance(answers, round(passes * share), seconds * share)
    finished = [each for each in running if each.result is not None]
    running[:] = [each for each in running if each.result is None]
    yield from (each.localization() for each in finished)
