"""Which set of neurons to score next: NeMo's search (Alg. 3 and 4) with as few scores as possible.

The search knows no tensors. It is a generator: it yields the trials that it needs and is sent their
similarities, so its caller can put the trials of many prompts into one batch. Three things make it
cheap:

- A set fails as soon as one seed exceeds the threshold. So each set is first tried on the seed that
  refuted a set last, and the other seeds are asked only about the final set.
- Runs of dispensable neurons are dropped with one trial: the next neuron that is needed is found by
  halving (adaptive group testing), in the order of the greedy sweep.
- The selection's sets are nested, so its schedule is searched instead of walked.

The last two hold only if the similarity is monotone: suppressing more never raises it. The result is
therefore proven: every seed is under the threshold, and for every neuron some seed is above it
without that neuron. If this proof, or any two trials on the way, contradict monotonicity, the prompt
is searched again as the released code does it, one set after the other, all seeds of each. There a
seed is left out only if the trials so far allow no other answer, even with scores twice as far from
monotone as the furthest seen. With scores that follow no rule, no seed is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_prune.engine.refinement import refine, refine_in_turn, sweep_by_cost, sweep_by_layers
from nemo_prune.engine.selection import Candidates, Selection, select, select_in_turn
from nemo_prune.engine.trials import Record, Search
from nemo_prune.mask import Neuron

# In a search set by set, scores may be this many times as far from monotone as was seen.
_SLACK = 2.0


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        selected: the step of the schedule at which the selection ended.
        resolved: whether that set reached tau; otherwise it is the schedule's last.
        selected_score: the highest similarity of the seeds that were tried under that set; the other
            seeds are under tau because they are under the refined set, a part of it.
        neurons: the refined set, in the order of the tests.
        neurons_score: the highest similarity of any seed under it.
        fell_back: whether the scores were not monotone, so every set was tried in turn.
        margin: the smallest distance of any similarity from what it was compared with.
    """

    selected: Candidates
    resolved: bool
    selected_score: float
    neurons: tuple[Neuron, ...]
    neurons_score: float
    fell_back: bool
    margin: float


def search_neurons(
    schedule: Sequence[Candidates],
    seeds: Sequence[int],
    threshold: float,
    layer_order: Sequence[str],
    costs: Mapping[Neuron, float] | None = None,
    widening: float = 0.0,
) -> Search[SearchResult]:
    """Find the neurons without which a prompt's seeds no longer agree (Alg. 3 and 4).

    A set is enough when no seed's similarity is above tau; in the refinement when all are strictly
    below it, as in the released code. A similarity that is NaN counts as too high.

    Args:
        schedule: the candidates per step, each set a part of the next.
        seeds: positions of the kept seeds.
        threshold: tau.
        layer_order: dotted module names in the order in which the refinement tests the layers.
        costs: what suppressing each neuron costs. With them a cheaper set is searched as well, which is
            not in the paper: single neurons alone are tested, the most costly first, which leaves the
            cheap ones. The cheaper of the two sets is taken.
        widening: with costs, the share of the schedule after the first set that is enough which is
            added to it, 0 to 1: with more candidates more of the costly ones can be spared.
    """
    record = Record(seeds)
    selection, neurons, fell_back = yield from _search_as_the_paper(schedule, record, threshold, layer_order)
    if costs is not None:
        pool = schedule[_widened(schedule.index(selection.step), len(schedule), widening)].neurons
        cheap = yield from refine(sweep_by_cost(pool, costs), selection, record)
        # The cheaper set is optional: if it cannot be proven, the paper's set stays.
        if cheap is not None and _total(costs, cheap) < _total(costs, neurons):
            neurons = cheap
    score = yield from record.score(frozenset(neurons), selection.limit)
    return SearchResult(
        selected=selection.step,
        resolved=selection.resolved,
        selected_score=record.highest_known(frozenset(selection.step.neurons)),
        neurons=neurons,
        neurons_score=score,
        fell_back=fell_back,
        margin=record.margin,
    )


def _search_as_the_paper(
    schedule: Sequence[Candidates], record: Record, threshold: float, layer_order: Sequence[str]
) -> Search[tuple[Selection, tuple[Neuron, ...], bool]]:
    """Where the selection ended, the refined set, and whether every set had to be tried in turn."""
    neurons, monotone, rounds = None, True, 0
    # A round that ends without neurons has refuted an initial set, so the next begins with a larger one.
    while neurons is None and monotone and rounds < len(schedule):
        selection = yield from select(schedule, record, threshold)
        neurons = yield from refine(sweep_by_layers(selection.step, layer_order), selection, record)
        monotone = not record.contradicts_monotonicity()
        rounds += 1
    fell_back = neurons is None or not monotone
    if fell_back:
        selection, neurons = yield from _search_in_turn(schedule, record, threshold, layer_order)
    return selection, neurons, fell_back


def _search_in_turn(
    schedule: Sequence[Candidates], record: Record, threshold: float, layer_order: Sequence[str]
) -> Search[tuple[Selection, tuple[Neuron, ...]]]:
    """The released code's procedure, set by set; a seed is asked unless its answer is known to follow.

    An answer follows if the trials so far allow no other, assuming that no score is more than twice as far from
    monotone as the furthest seen. If a later trial breaks that assumption, everything is decided again with more
    room.
    """
    record.slack = _SLACK * record.largest_violation()
    while True:
        selection = yield from select_in_turn(schedule, record, threshold)
        neurons = yield from refine_in_turn(sweep_by_layers(selection.step, layer_order), selection.limit, record)
        needed = _SLACK * record.largest_violation()
        if needed <= record.slack:
            return selection, neurons
        record.slack = needed


def _widened(first: int, steps: int, widening: float) -> int:
    """The step of the schedule at a share of the way from one step to the last."""
    return first + round(widening * (steps - 1 - first))


def _total(costs: Mapping[Neuron, float], neurons: Sequence[Neuron]) -> float:
    return sum(costs[neuron] for neuron in neurons)
