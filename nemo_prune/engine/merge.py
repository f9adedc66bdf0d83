"""One mask for a corpus: the union of its prompts' neurons, or prompt by prompt on top of the mask so far."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_prune.engine.localize import Detected, Localizer, PromptLocalization, detect, localize_on_top
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.trials import Trial
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.progress import Advance, ignored

ROUNDS = 3


def union_mask(
    localizations: Sequence[PromptLocalization], sizes: Mapping[str, int], include_unresolved: bool = False
) -> NeuronMask:
    """The union of the localized prompts' neurons, as in the paper.

    Sets of unresolved prompts stay out unless asked for: on SD v1-4 they would take a third of all.
    """
    return NeuronMask.from_neurons(
        (neuron for each in _merged(localizations, include_unresolved) for neuron in each.neurons), sizes
    )


def prompts_per_neuron(
    localizations: Sequence[PromptLocalization], mask: NeuronMask, include_unresolved: bool = False
) -> dict[str, dict[int, int]]:
    """How many prompts need each neuron of a mask, without saying which.

    In an incremental merge a prompt that others silence has no set of its own and does not count; the prompts counted
    are those that brought a neuron into the mask.

    Returns:
        Layer -> row -> number of prompts in whose own set the neuron is, for the pruned neurons.
    """
    needed = Counter(neuron for each in _merged(localizations, include_unresolved) for neuron in set(each.neurons))
    counts: dict[str, dict[int, int]] = {}
    for neuron in mask.neurons:
        counts.setdefault(neuron.layer, {})[neuron.index] = needed[neuron]
    return counts


def _merged(localizations: Sequence[PromptLocalization], include_unresolved: bool) -> list[PromptLocalization]:
    statuses = {"localized", "unresolved"} if include_unresolved else {"localized"}
    return [each for each in localizations if each.status in statuses]


def localize_incrementally(
    localizer: Localizer, prompts: Sequence[str], suppressed: Collection[Neuron] = ()
) -> Iterator[PromptLocalization]:
    """Go through a corpus in its order, each prompt on top of the neurons of those before it.

    A prompt that these silence already needs no neuron of its own and costs one score.

    Args:
        localizer: the model and what is usual for it.
        prompts: texts, in the order of the corpus.
        suppressed: neurons of prompts that were done before.

    Yields:
        One result per prompt, in the order of the corpus; its neurons are those that came on top.
    """
    scorer, threshold = localizer.scorer, localizer.threshold
    neurons = set(suppressed)
    waiting = list(prompts)[::-1]
    while waiting:
        group = [waiting.pop() for _ in range(min(len(waiting), scorer.prompts_at_once))]
        for detected in detect(scorer, group, threshold):
            if not detected.kept_seeds:
                yield detected.not_memorized()
                continue
            passes_before = scorer.sample_passes
            silent = _Corpus(scorer, [detected], threshold).is_silent(detected, neurons)
            passes = detected.sample_passes + scorer.sample_passes - passes_before
            detected = replace(detected, sample_passes=passes)
            if silent:
                yield _silenced(detected)
                continue
            found = localize_on_top(localizer, detected, neurons)
            if found.status == "localized":
                neurons.update(found.neurons)
            yield found


@dataclass(frozen=True)
class SettledMask:
    """A corpus' mask that was scored again as a whole.

    Attributes:
        mask: without the neurons that no prompt needs.
        localizations: the prompts; those that the others' neurons silenced, or that were localized
            on top of them, carry their new result.
        rounds: how often prompts had to be localized again.
        num_dropped: neurons that no prompt needed any more.
    """

    mask: NeuronMask
    localizations: tuple[PromptLocalization, ...]
    rounds: int
    num_dropped: int


def settle_mask(
    localizer: Localizer,
    localizations: Sequence[PromptLocalization],
    advance: Advance = ignored,
    log_file: Path | None = None,
) -> SettledMask:
    """Score every memorized prompt under the merged mask, localize what came back, drop what is not needed.

    Args:
        localizer: the model and what is usual for it; with ``preserve`` the most costly neurons are tried first when
            neurons are dropped.
        localizations: one per prompt, in the order of the corpus.
        advance: called with the neurons that were tried and their number.
        log_file: keeps which neurons are needed, as each is tried; neurons in it are not tried again.
    """
    scorer, threshold, preserve = localizer.scorer, localizer.threshold, localizer.preserve
    results = {each.prompt: each for each in localizations}
    memorized = [each.prompt for each in localizations if each.is_memorized]
    corpus = _Corpus(scorer, [d for prompt in memorized for d in detect(scorer, [prompt], threshold)], threshold)
    neurons = set(union_mask(localizations, scorer.predictor.sizes).neurons)
    rounds, awake = 0, corpus.awake_under(neurons)
    while awake and rounds < ROUNDS:
        rounds += 1
        for detected in awake:
            # Neurons added for another prompt may silence it already.
            if corpus.is_silent(detected, neurons):
                continue
            found = localize_on_top(localizer, detected, neurons)
            if found.status == "localized":
                neurons.update(found.neurons)
                results[found.prompt] = _joined(results[found.prompt], found)
        awake = corpus.awake_under(neurons)
    for detected in awake:
        # Whatever was found for it is not enough under the mask.
        prompt = detected.scored.prompt
        results[prompt] = replace(results[prompt], status="unresolved", silenced_by_others=False)
    silenced = corpus.without({detected.scored.prompt for detected in awake})
    for detected in silenced.detected:
        if results[detected.scored.prompt].status == "unresolved":
            results[detected.scored.prompt] = _silenced(detected)
    order = list(scorer.predictor.layers)[::-1]
    tried = sorted(neurons, key=lambda n: (-preserve.costs[n], n) if preserve else (order.index(n.layer), n.index))
    needing = {neuron: each.prompt for each in results.values() for neuron in each.neurons}
    log = LineLog(log_file, {"tried": tried, "threshold": threshold}) if log_file else None
    needed = _needed(silenced, tried, needing, log, advance)
    return SettledMask(
        mask=NeuronMask.from_neurons(needed, scorer.predictor.sizes),
        localizations=tuple(results[each.prompt] for each in localizations),
        rounds=rounds,
        num_dropped=len(tried) - len(needed),
    )


def _needed(
    silenced: "_Corpus",
    tried: Sequence[Neuron],
    needing: Mapping[Neuron, str],
    log: LineLog | None,
    advance: Advance,
) -> set[Neuron]:
    """Drop neurons one after the other as long as all prompts stay silent, and return what remains.

    Args:
        silenced: the prompts.
        tried: the neurons, in the order in which they are tried.
        needing: neuron -> the prompt to ask first.
        log: holds what is known already, and takes what is found.
        advance: called with the neurons that were tried and their number.
    """
    neurons = set(tried)
    known = {Neuron(layer, index): is_needed for layer, index, is_needed in log or ()}
    for done, neuron in enumerate(tried, start=1):
        if neuron not in known:
            known[neuron] = not silenced.is_silenced_by(neurons - {neuron}, needing.get(neuron))
            if log:
                log.append([*neuron, known[neuron]])
        if not known[neuron]:
            neurons.remove(neuron)
        advance(done, len(tried))
    return neurons


def _silenced(detected: Detected) -> PromptLocalization:
    """The result for a prompt that other prompts' neurons silence."""
    return PromptLocalization(
        prompt=detected.scored.prompt,
        status="localized",
        score=detected.scored.memorization.score,
        kept_seeds=detected.kept_seeds,
        silenced_by_others=True,
        sample_passes=detected.sample_passes,
        seconds=detected.seconds,
    )


def _joined(old: PromptLocalization, new: PromptLocalization) -> PromptLocalization:
    """The result of a prompt that was localized again, with its earlier neurons if they are in the mask."""
    if old.status != "localized":
        return new
    neurons = (*old.neurons, *(neuron for neuron in new.neurons if neuron not in old.neurons))
    return replace(new, neurons=neurons, sample_passes=old.sample_passes + new.sample_passes)


class _Corpus:
    """Memorized prompts, asked whether they are silent under a set of neurons.

    A prompt is silent when no kept seed's similarity is above the threshold. The seed that was
    above it last is asked first.
    """

    def __init__(self, scorer: Scorer, detected: Sequence[Detected], threshold: float) -> None:
        self.detected = list(detected)
        self._scorer, self._threshold = scorer, threshold
        self._seeds = {each.scored.prompt: list(each.kept_seeds) for each in self.detected}

    def without(self, prompts: Collection[str]) -> "_Corpus":
        """The corpus without some prompts."""
        kept = [each for each in self.detected if each.scored.prompt not in prompts]
        return _Corpus(self._scorer, kept, self._threshold)

    def is_silenced_by(self, neurons: Collection[Neuron], first: str | None = None) -> bool:
        """Whether all prompts are silent; stops at the first seed that is not.

        Args:
            neurons: what is suppressed.
            first: the prompt to ask before all others.
        """
        ordered = sorted(self.detected, key=lambda each: each.scored.prompt != first)
        hardest = [(each, self._seeds[each.scored.prompt][0]) for each in ordered]
        others = [(each, seed) for each in ordered for seed in self._seeds[each.scored.prompt][1:]]
        size = self._scorer.predictor.batch_size
        parts = [hardest[:1], hardest[1:], *(others[start : start + size] for start in range(0, len(others), size))]
        return not any(self._first_above(neurons, part) for part in parts if part)

    def awake_under(self, neurons: Collection[Neuron]) -> list[Detected]:
        """The prompts that are not silent."""
        return [each for each in self.detected if not self.is_silent(each, neurons)]

    def is_silent(self, detected: Detected, neurons: Collection[Neuron]) -> bool:
        """Whether one of the prompts is silent."""
        seeds = [(detected, seed) for seed in self._seeds[detected.scored.prompt]]
        return not any(self._first_above(neurons, part) for part in (seeds[:1], seeds[1:]) if part)

    def _first_above(self, neurons: Collection[Neuron], pairs: Sequence[tuple[Detected, int]]) -> bool:
        if not neurons:
            return True
        trials = [(each.scored, Trial(frozenset(neurons), seed, self._threshold)) for each, seed in pairs]
        for (each, seed), similarity in zip(pairs, self._scorer.answer(trials), strict=True):
            if not similarity <= self._threshold:
                seeds = self._seeds[each.scored.prompt]
                seeds.remove(seed)
                seeds.insert(0, seed)
                return True
        return False
