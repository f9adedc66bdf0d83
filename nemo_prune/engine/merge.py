"""One mask for a corpus: the union of its prompts' neurons, whole, thinned, or without what no prompt needs."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_prune.engine.dropping import drop_unneeded
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.silence import Silence
from nemo_prune.errors import PromptError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.progress import Advance, ignored

ROUNDS = 3
# What is left of neurons without those that cost ordinary captions most.
Thin = Callable[[Collection[Neuron]], Collection[Neuron]]


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

    A prompt that only others' neurons silence has no set of its own and counts nowhere.

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


@dataclass(frozen=True)
class SettledMask:
    """A corpus' mask that was scored again as a whole.

    Attributes:
        mask: without what was thinned out, or what no prompt needs.
        localizations: the prompts; those that the others' neurons silenced, or that were localized
            on top of them, carry their new result.
        rounds: how often prompts had to be localized again.
        num_dropped: neurons of the union that are not in it.
    """

    mask: NeuronMask
    localizations: tuple[PromptLocalization, ...]
    rounds: int
    num_dropped: int


def settle_mask(
    localizer: Localizer,
    localizations: Sequence[PromptLocalization],
    advance: Advance = ignored,
    thin: Thin | None = None,
    released: Localizer | None = None,
) -> SettledMask:
    """Score every memorized prompt under the merged mask, localize what came back, thin or drop what is not needed.

    Args:
        localizer: the model and what is usual for it; where it knows what neurons cost, the most costly ones are
            dropped first.
        localizations: one per prompt, in the order of the corpus.
        advance: called with the neurons that were tried and their number.
        thin: thins the union, and what comes back is localized on top; without it all neurons are dropped that no
            prompt needs to be silent.
        released: asks whether prompts are silent under the mask, where what it suppresses is stood in for as a release
            does; the localizer itself unless given.
    """
    sizes = localizer.scorer.predictor.sizes
    results = {each.prompt: each for each in localizations}
    kept_seeds = {each.prompt: each.kept_seeds for each in localizations if each.is_memorized}
    silence = Silence(released or localizer, kept_seeds)
    neurons = set(union_mask(localizations, sizes).neurons)
    awake, rounds = _localize_what_is_awake(localizer, silence, results, neurons)
    whole = set(neurons)
    if thin is not None and neurons:
        neurons = set(thin(neurons))
        awake, more = _localize_what_is_awake(localizer, silence, results, neurons)
        rounds += more
    silenced = [prompt for prompt in silence.prompts if prompt not in awake]
    for prompt in silenced:
        if results[prompt].status == "unresolved":
            results[prompt] = replace(
                results[prompt], status="localized", neurons=(), neurons_score=None, silenced_by_others=True
            )
    if thin is None:
        neurons = _needed(localizer, silence, results, silenced, neurons, advance)
    return SettledMask(
        mask=NeuronMask.from_neurons(neurons, sizes),
        localizations=tuple(
            replace(found, sample_passes=found.sample_passes + silence.passes[found.prompt])
            for found in (results[each.prompt] for each in localizations)
        ),
        rounds=rounds,
        num_dropped=len(whole - set(neurons)),
    )


def _needed(
    localizer: Localizer,
    silence: Silence,
    results: Mapping[str, PromptLocalization],
    silenced: Sequence[str],
    neurons: Collection[Neuron],
    advance: Advance,
) -> set[Neuron]:
    """What is left when every neuron was dropped that no prompt needs, the most costly ones first."""
    order, preserve = list(localizer.scorer.predictor.sizes)[::-1], localizer.preserve
    tried = sorted(neurons, key=lambda n: (-preserve.costs[n], n) if preserve else (order.index(n.layer), n.index))
    needing: dict[Neuron, list[str]] = {}
    for prompt in silenced:
        for neuron in results[prompt].neurons:
            needing.setdefault(neuron, []).append(prompt)
    return drop_unneeded(localizer, silence, silenced, tried, needing, advance)


def _localize_what_is_awake(
    localizer: Localizer, silence: Silence, results: dict[str, PromptLocalization], neurons: set[Neuron]
) -> tuple[list[str], int]:
    """Localize prompts that were silent by themselves and are awake under a mask on top of it, until nothing is added.

    Scores are not monotone: what one prompt needs may wake another. An unresolved prompt is not tried on top of the
    mask: it would take hundreds of neurons, where any. None is tried twice under the same mask. ``results`` and
    ``neurons`` take in what is found.

    Returns:
        The prompts that stay awake, and the number of rounds.
    """
    awake, rounds = silence.awake(list(silence.prompts), neurons), 0
    tried: dict[str, frozenset[Neuron]] = {}
    while rounds < ROUNDS:
        mask = frozenset(neurons)
        again = [text for text in awake if results[text].status == "localized" and tried.get(text) != mask]
        if not again:
            break
        rounds += 1
        for found in localize_prompts(localizer, again, mask):
            tried[found.prompt] = mask
            results[found.prompt] = _joined(results[found.prompt], found)
            if found.status == "localized":
                neurons.update(found.neurons)
        if neurons == mask:
            break
        awake = silence.awake(list(silence.prompts), neurons)
    return awake, rounds


def _joined(old: PromptLocalization, new: PromptLocalization) -> PromptLocalization:
    """The result of a prompt that was localized again, with its earlier neurons if they are in the mask."""
    passes, seconds = old.sample_passes + new.sample_passes, old.seconds + new.seconds
    if new.status != "localized":
        return replace(old, sample_passes=passes, seconds=seconds)
    neurons = new.neurons
    if old.status == "localized":
        neurons = (*old.neurons, *(neuron for neuron in new.neurons if neuron not in old.neurons))
    return replace(new, neurons=neurons, sample_passes=passes, seconds=seconds)
