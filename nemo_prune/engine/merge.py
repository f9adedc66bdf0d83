"""One mask for a corpus: the union of its prompts' neurons, or some prompts at a time on top of the mask so far."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_prune.engine.dropping import drop_unneeded
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_on_top, not_memorized
from nemo_prune.engine.memo import Detected
from nemo_prune.engine.silence import Silence
from nemo_prune.errors import PromptError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.progress import Advance, ignored

# Prompts that an incremental merge searches side by side: the more, the fuller the batches, and the more of them are
# searched although another one's neurons silence them. The first few neurons silence the most, so that it begins small.
_FIRST_WINDOW, WINDOW = 4, 128
ROUNDS = 3


def union_mask(
    localizations: Sequence[PromptLocalization], sizes: Mapping[str, int], include_unresolved: bool = False
) -> NeuronMask:
    """The union of the localized prompts' neurons, as in the paper.

    Sets of unresolved prompts stay out unless asked for: on SD v1-4 they would take a third of all.

    Raises:
        PromptError: they are asked for, and were not refined when the prompts were localized.
    """
    if include_unresolved and any(
        each.status == "unresolved" and each.candidates and not each.neurons for each in localizations
    ):
        raise PromptError(
            "The sets of unresolved prompts were not refined, so that they can't be merged. Localize the prompts with "
            "--include-unresolved."
        )
    return NeuronMask.from_neurons(
        (neuron for each in _merged(localizations, include_unresolved) for neuron in each.neurons), sizes
    )


def prompts_per_neuron(
    localizations: Sequence[PromptLocalization], mask: NeuronMask, include_unresolved: bool = False
) -> dict[str, dict[int, int]]:
    """How many prompts need each neuron of a mask, without saying which.

    In an incremental merge a prompt that others silence has no set of its own and counts nowhere, so that these are
    the prompts that brought a neuron into the mask.

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
    localizer: Localizer,
    prompts: Sequence[str],
    suppressed: Collection[Neuron] = (),
    known: Sequence[PromptLocalization] = (),
) -> Iterator[PromptLocalization]:
    """Go through a corpus in its order, some prompts at a time, on top of the neurons of those before them.

    A prompt that these silence already needs no neuron of its own and costs one score. The prompts of a window are
    searched side by side, on top of the mask so far. What is found counts in their order: one that the neurons of
    those before it silence meanwhile needs none either. Windows are counted from the beginning of the corpus, so that
    a run that was stopped finds the same.

    Args:
        localizer: the model and what is usual for it.
        prompts: texts, in the order of the corpus.
        suppressed: neurons that stay suppressed throughout.
        known: results that are there already.

    Yields:
        One result per prompt that has none yet, in the order of the corpus; its neurons are those that came on top.
    """
    results = {each.prompt: each for each in known}
    done = set(results)
    neurons = set(suppressed)
    for window in _windows(prompts):
        if not done.issuperset(window):
            for found in _localize_window(localizer, window, results, frozenset(neurons)):
                results[found.prompt] = found
                if found.prompt not in done:
                    yield found
        neurons.update(
            neuron for text in window if results[text].status == "localized" for neuron in results[text].neurons
        )


def _windows(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Parts of a corpus, each twice as long as the one before it up to the largest."""
    start, size = 0, _FIRST_WINDOW
    while start < len(prompts):
        yield prompts[start : start + size]
        start, size = start + size, min(2 * size, WINDOW)


def _localize_window(
    localizer: Localizer,
    window: Sequence[str],
    known: Mapping[str, PromptLocalization],
    neurons: frozenset[Neuron],
) -> Iterator[PromptLocalization]:
    """The results of a window's prompts, in their order; what is known is asked again of the memo alone."""
    waiting = [text for text in window if text not in known or known[text].is_memorized]
    detected = {each.scored.prompt: each for each in localizer.detect(waiting)}
    memorized = [each for each in detected.values() if each.kept_seeds]
    silence = Silence(localizer, {each.scored.prompt: each.kept_seeds for each in memorized})
    awake = silence.awake(list(silence.prompts), neurons)
    found = {each.prompt: each for each in localize_on_top(localizer, [detected[text] for text in awake], neurons)}
    for text in waiting:
        each = detected[text]
        if not each.kept_seeds:
            yield not_memorized(each)
        elif text not in awake:
            yield _silenced(each, silence)
        else:
            yield replace(found[text], sample_passes=found[text].sample_passes + silence.passes[text])
            if found[text].status == "localized" and found[text].neurons:
                neurons |= set(found[text].neurons)
                later = awake[awake.index(text) + 1 :]
                awake = awake[: awake.index(text) + 1] + silence.awake(later, neurons)


@dataclass(frozen=True)
class SettledMask:
    """A corpus' mask that was scored again as a whole.

    Attributes:
        mask: what no prompt needs is not in it.
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
    localizer: Localizer, localizations: Sequence[PromptLocalization], advance: Advance = ignored
) -> SettledMask:
    """Score every memorized prompt under the merged mask, localize what came back, drop what is not needed.

    Args:
        localizer: the model and what is usual for it; with ``preserve`` the most costly neurons are tried first when
            neurons are dropped.
        localizations: one per prompt, in the order of the corpus.
        advance: called with the neurons that were tried and their number.
    """
    sizes, preserve = localizer.scorer.predictor.sizes, localizer.preserve
    results = {each.prompt: each for each in localizations}
    silence = Silence(localizer, {each.prompt: each.kept_seeds for each in localizations if each.is_memorized})
    neurons = set(union_mask(localizations, sizes).neurons)
    awake, rounds = _localize_what_is_awake(localizer, silence, results, neurons)
    silenced = [prompt for prompt in silence.prompts if prompt not in awake]
    for prompt in silenced:
        if results[prompt].status == "unresolved":
            results[prompt] = replace(
                results[prompt], status="localized", neurons=(), neurons_score=None, silenced_by_others=True
            )
    order = list(sizes)[::-1]
    tried = sorted(neurons, key=lambda n: (-preserve.costs[n], n) if preserve else (order.index(n.layer), n.index))
    needing: dict[Neuron, list[str]] = {}
    for prompt in silenced:
        for neuron in results[prompt].neurons:
            needing.setdefault(neuron, []).append(prompt)
    needed = drop_unneeded(localizer, silence, silenced, tried, needing, advance)
    return SettledMask(
        mask=NeuronMask.from_neurons(needed, sizes),
        localizations=tuple(
            replace(found, sample_passes=found.sample_passes + silence.passes[found.prompt])
            for found in (results[each.prompt] for each in localizations)
        ),
        rounds=rounds,
        num_dropped=len(tried) - len(needed),
    )


def _localize_what_is_awake(
    localizer: Localizer, silence: Silence, results: dict[str, PromptLocalization], neurons: set[Neuron]
) -> tuple[list[str], int]:
    """Localize the prompts that are awake under a mask on top of it, in rounds, until nothing is added.

    What even everything suppressed does not silence is not tried again, nor any prompt under a mask that it was tried
    under. ``results`` and ``neurons`` take in what is found.

    Returns:
        The prompts that stay awake, and the number of rounds.
    """
    awake, rounds = silence.awake(list(silence.prompts), neurons), 0
    tried: dict[str, frozenset[Neuron]] = {}
    while rounds < ROUNDS:
        mask = frozenset(neurons)
        again = [text for text in awake if not results[text].beyond_reach and tried.get(text) != mask]
        if not again:
            break
        rounds += 1
        before = {text: results[text] for text in again}
        for text, found in zip(again, _localize_again(localizer, silence, again, neurons), strict=True):
            tried[text] = mask
            if found is not None:
                results[text] = _joined(before[text], found)
        if neurons == mask:
            break
        awake = silence.awake(list(silence.prompts), neurons)
    return awake, rounds


def _localize_again(
    localizer: Localizer, silence: Silence, prompts: Sequence[str], neurons: set[Neuron]
) -> Iterator[PromptLocalization | None]:
    """The new results of prompts, some at a time on top of the mask so far; None where others silence them."""
    for start in range(0, len(prompts), WINDOW):
        window = silence.awake(prompts[start : start + WINDOW], neurons) if start else prompts[:WINDOW]
        # Their detection is in the passes of their first result.
        detected = [replace(each, sample_passes=0, seconds=0.0) for each in localizer.detect(window)]
        found = dict(zip(window, localize_on_top(localizer, detected, neurons), strict=True))
        for text in prompts[start : start + WINDOW]:
            if text in found and found[text].status == "localized":
                neurons.update(found[text].neurons)
            yield found.get(text)


def _silenced(detected: Detected, silence: Silence) -> PromptLocalization:
    """The result for a prompt that other prompts' neurons silence."""
    return PromptLocalization(
        prompt=detected.scored.prompt,
        status="localized",
        score=detected.scored.memorization.score,
        kept_seeds=detected.kept_seeds,
        silenced_by_others=True,
        sample_passes=detected.sample_passes + silence.passes[detected.scored.prompt],
        seconds=detected.seconds,
    )


def _joined(old: PromptLocalization, new: PromptLocalization) -> PromptLocalization:
    """The result of a prompt that was localized again, with its earlier neurons if they are in the mask."""
    passes, seconds = old.sample_passes + new.sample_passes, old.seconds + new.seconds
    if new.status != "localized":
        return replace(old, sample_passes=passes, seconds=seconds)
    neurons = new.neurons
    if old.status == "localized":
        neurons = (*old.neurons, *(neuron for neuron in new.neurons if neuron not in old.neurons))
    return replace(new, neurons=neurons, sample_passes=passes, seconds=seconds)
