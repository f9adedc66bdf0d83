"""Which set of neurons to score next: NeMo's search (Alg. 3 and 4) with as few scores as it can.

The search knows no tensors. It is a generator: it yields the trials that it wants to know about and
is sent their similarities, so that whoever drives it can put the trials of many prompts into one
batch. Three things make it cheap:

- A set fails as soon as one seed exceeds the threshold. So a set is tried on the seed first that
  refuted a set last, and the other seeds are asked only about what would be the result.
- Runs of dispensable neurons go with one trial: the next neuron that can't be spared is searched
  for by halving (adaptive group testing), in the very order of the greedy sweep.
- The selection's sets are nested, so its schedule is searched instead of walked.

The last two hold only if the similarity is monotone: suppressing more never raises it. The result is
therefore proven: every seed under the threshold, and for every neuron a seed above it without that
neuron. Where this, or any two trials on the way, contradict monotonicity, the prompt is searched
again as the released code does it, one set after the other, all seeds of each. There a seed is left
out only where the trials so far leave no room for another answer, even if scores are twice as far
from monotone as the furthest that was seen. Scores without any rule leave no such place. The next few sets of such a
search are asked about at once.

What the whole of the layers does not bring under tau, no part of them is likely to: that is asked first, and then the
selection's sets all at once. An unresolved prompt is not refined unless its set is wanted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_prune.engine.refinement import refine, refine_in_turn, spare_neurons, sweep_by_cost, sweep_by_layers
from nemo_prune.engine.selection import Candidates, Selection, first_unrefuted, select, select_in_turn
from nemo_prune.engine.trials import Limit, Record, Search, Why
from nemo_prune.mask import Neuron


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        selected: the step of the schedule at which the selection ended.
        resolved: whether that set reached tau; otherwise it is the schedule's last.
        selected_score: the highest similarity of those seeds that were tried under that set; the
            others are under tau because they are so under the refined set, a part of it.
        neurons: the refined set, in the order of the tests; empty where an unresolved prompt's is not wanted.
        neurons_score: the highest similarity of any seed under it; None without one.
        fell_back: whether the scores were not monotone, so that every set was tried in turn.
        margin: the smallest distance of any similarity from what it was compared with.
        spare: neurons of the refined set whose absence alone no seed refutes; only a search set by set leaves any.
        beyond_reach: whether even everything suppressed does not bring the prompt under tau.
    """

    selected: Candidates
    resolved: bool
    selected_score: float
    neurons: tuple[Neuron, ...]
    neurons_score: float | None
    fell_back: bool
    margin: float
    spare: tuple[Neuron, ...] = ()
    beyond_reach: bool = False


@dataclass(frozen=True)
class SearchOptions:
    """What a search does beyond the paper.

    Attributes:
        costs: what suppressing each neuron costs; with them a cheaper set is searched as well, which is
            not in the paper: single neurons alone are tested, the most costly first, so that what remains
            is cheap. The cheaper one of both counts.
        widening: with costs, how much of the schedule behind the first set that is enough is added to
            it, 0 to 1: the more candidates there are, the more of the costly ones can be spared.
        everything: all neurons of the layers; with them it is asked first whether they are enough.
        refine_unresolved: whether the set of an unresolved prompt is refined.
        check_way: whether the refinement asks about the sets that it jumped over too, on every seed that may be above
            tau: what is not monotone there would have led the released code elsewhere.
        reach: how far below the similarity over all seeds that of a seed alone may be, see
            :class:`~nemo_prune.engine.trials.Record`.
        slack: how many times further from monotone than was seen scores may be, where a seed is not asked.
    """

    costs: Mapping[Neuron, float] | None = None
    widening: float = 0.0
    everything: frozenset[Neuron] = frozenset()
    refine_unresolved: bool = True
    check_way: bool = False
    reach: float = 0.0
    slack: float = 2.0


@dataclass(frozen=True)
class _Way:
    """Where the paper's way ended.

    Attributes:
        selection: of the initial set.
        neurons: the refined set; empty where it is not wanted.
        fell_back: whether every set had to be tried in turn.
        spare: neurons of the set that could be spared alone; none where it did not fall back.
    """

    selection: Selection
    neurons: tuple[Neuron, ...] = ()
    fell_back: bool = False
    spare: tuple[Neuron, ...] = ()


def search_neurons(
    schedule: Sequence[Candidates],
    seeds: Sequence[int],
    threshold: float,
    layer_order: Sequence[str],
    options: SearchOptions = SearchOptions(),
) -> Search[SearchResult]:
    """Find the neurons without which a prompt's seeds no longer agree (Alg. 3 and 4).

    A set is enough when no seed's similarity is above tau; in the refinement when all are strictly
    below it, as in the released code. A similarity that is NaN counts as too high.

    Args:
        schedule: the candidates per step, each set a part of the next.
        seeds: positions of the kept seeds.
        threshold: tau.
        layer_order: dotted module names in the order in which the refinement tests the layers.
        options: what is not in the paper.
    """
    record = Record(seeds, reach=options.reach)
    beyond_reach = yield from _is_beyond_reach(schedule, record, threshold, options)
    if beyond_reach and not options.refine_unresolved:
        selection = Selection(schedule[-1], False, Limit(threshold, strict=False))
        return search_result(record, selection, (), None, beyond_reach=True)
    way = yield from _search_as_the_paper(schedule, record, threshold, layer_order, options)
    selection, neurons, fell_back, spare = way.selection, way.neurons, way.fell_back, way.spare
    if not neurons:
        return search_result(record, selection, (), None, fell_back, beyond_reach=beyond_reach)
    if options.costs is not None:
        pool = schedule[_widened(schedule.index(selection.step), len(schedule), options.widening)].neurons
        cheap = yield from refine(sweep_by_cost(pool, options.costs), selection, record)
        # What can't be proven is not needed: the paper's set stands.
        if cheap is not None and _total(options.costs, cheap) < _total(options.costs, neurons):
            neurons, spare = cheap, ()
    record.why = Why.ENOUGH
    score = yield from record.score(frozenset(neurons), selection.limit)
    return search_result(record, selection, neurons, score, fell_back, spare, beyond_reach)


def search_result(
    record: Record,
    selection: Selection,
    neurons: tuple[Neuron, ...],
    score: float | None,
    fell_back: bool = False,
    spare: tuple[Neuron, ...] = (),
    beyond_reach: bool = False,
) -> SearchResult:
    """What a search found, with what its record knows of it."""
    return SearchResult(
        selected=selection.step,
        resolved=selection.resolved,
        selected_score=record.highest_known(frozenset(selection.step.neurons)),
        neurons=neurons,
        neurons_score=score,
        fell_back=fell_back,
        margin=record.margin,
        spare=spare,
        beyond_reach=beyond_reach,
    )


def _is_beyond_reach(
    schedule: Sequence[Candidates], record: Record, threshold: float, options: SearchOptions
) -> Search[bool]:
    """Whether neither everything suppressed nor any set of the schedule brings the prompt under tau."""
    if not options.everything:
        return False
    limit, record.why = Limit(threshold, strict=False), Why.EVERYTHING
    if not (yield from record.is_refuted(options.everything, limit)):
        return False
    # Scores need not be monotone: a part of everything might do what the whole does not.
    record.why = Why.SELECTION
    sets = [frozenset(step.neurons) for step in schedule]
    return (yield from first_unrefuted(sets, record, limit)) == len(sets)


def _search_as_the_paper(
    schedule: Sequence[Candidates],
    record: Record,
    threshold: float,
    layer_order: Sequence[str],
    options: SearchOptions,
) -> Search[_Way]:
    """Jump over sets as long as scores are monotone, else try every set in turn."""
    neurons, monotone, rounds, wanted = None, True, 0, options.refine_unresolved
    # A round that ends without neurons has refuted an initial set, so that the next begins with a larger one.
    while neurons is None and monotone and rounds < len(schedule):
        selection = yield from select(schedule, record, threshold, wanted)
        if not selection.resolved and not wanted:
            return _Way(selection)
        start = sweep_by_layers(selection.step, layer_order)
        neurons = yield from refine(start, selection, record, options.slack if options.check_way else None)
        monotone = not record.contradicts_monotonicity()
        rounds += 1
    if neurons is not None and monotone:
        return _Way(selection, neurons)
    return (yield from _search_in_turn(schedule, record, threshold, layer_order, options))


def _search_in_turn(
    schedule: Sequence[Candidates],
    record: Record,
    threshold: float,
    layer_order: Sequence[str],
    options: SearchOptions,
) -> Search[_Way]:
    """The released code's procedure, set by set; a seed is asked unless it is known what it must answer.

    It must answer what the trials so far leave no room for, if no score is further from monotone than the
    furthest that was seen, times the slack. Where a trial on the way is, or of the proof at its end, all of it is
    decided again with more room.
    """
    record.slack = options.slack * record.largest_violation()
    while True:
        record.why = Why.IN_TURN
        selection = yield from select_in_turn(schedule, record, threshold, options.refine_unresolved)
        if not selection.resolved and not options.refine_unresolved:
            return _Way(selection, fell_back=True)
        neurons = yield from refine_in_turn(sweep_by_layers(selection.step, layer_order), selection.limit, record)
        spare: tuple[Neuron, ...] = ()
        if neurons:
            spare = yield from spare_neurons(neurons, selection.limit, record)
            record.why = Why.ENOUGH
            yield from record.score(frozenset(neurons), selection.limit)
        needed = options.slack * record.largest_violation()
        if needed <= record.slack:
            return _Way(selection, neurons, True, spare)
        record.slack = needed


def _widened(first: int, steps: int, widening: float) -> int:
    """The step of the schedule that lies a share of the way from one to the last."""
    return first + round(widening * (steps - 1 - first))


def _total(costs: Mapping[Neuron, float], neurons: Sequence[Neuron]) -> float:
    return sum(costs[neuron] for neuron in neurons)
