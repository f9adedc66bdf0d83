"""The refined set (Alg. 4): what of the initial set can't be spared, in the order of the greedy sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log

from nemo_prune.engine.selection import Candidates, Selection
from nemo_prune.engine.trials import Limit, Record, Search, Why
from nemo_prune.mask import Neuron

# Groups that are asked about at once in a search set by set.
_LONGEST_RUN = 8


@dataclass(frozen=True)
class Sweep:
    """Where the greedy sweep stands.

    Attributes:
        kept: what is suppressed, in the order of the tests.
        pending: groups that are still to be tested: layers first, then single neurons.
        of_layers: whether the groups are layers.
        needed: how many groups of this kind were found to be needed.
        tested: how many groups of this kind were decided.
    """

    kept: tuple[Neuron, ...]
    pending: tuple[tuple[Neuron, ...], ...]
    of_layers: bool
    needed: int = 0
    tested: int = 0

    def without(self, groups: int) -> frozenset[Neuron]:
        """What remains suppressed when so many pending groups act again."""
        return frozenset(self.kept).difference(*self.pending[:groups])

    def after(self, dropped: int, needed: int) -> "Sweep":
        """The sweep after so many groups were dropped and so many after them found to be needed."""
        remaining = self.without(dropped)
        return Sweep(
            kept=tuple(neuron for neuron in self.kept if neuron in remaining),
            pending=self.pending[dropped + needed :],
            of_layers=self.of_layers,
            needed=self.needed + needed,
            tested=self.tested + dropped + needed,
        )

    def of_neurons(self) -> "Sweep":
        """The sweep over single neurons, after that over layers."""
        return Sweep(self.kept, tuple((neuron,) for neuron in self.kept), of_layers=False)

    @property
    def likely_run(self) -> int:
        """How many groups at once are dispensable with about even odds, going by those so far."""
        share_needed = (self.needed + 1) / (self.tested + 3)
        return min(len(self.pending), max(1, round(log(2) / share_needed)))


def sweep_by_layers(candidates: Candidates, layer_order: Sequence[str]) -> Sweep:
    """The start of the paper's sweep: layers first, in their order, then single neurons."""
    ordered = sorted(candidates.neurons, key=lambda neuron: layer_order.index(neuron.layer))
    layers = [tuple(neuron for neuron in ordered if neuron.layer == layer) for layer in layer_order]
    return Sweep(tuple(ordered), tuple(layer for layer in layers if layer), of_layers=True)


def sweep_by_cost(neurons: Sequence[Neuron], costs: Mapping[Neuron, float]) -> Sweep:
    """The start of a sweep over single neurons, the most costly first."""
    return Sweep(tuple(sorted(neurons, key=lambda neuron: -costs[neuron])), (), of_layers=True)


def refine(
    start: Sweep, selection: Selection, record: Record, slack: float | None = None
) -> Search[tuple[Neuron, ...] | None]:
    """The greedy sweep, with runs dropped at once; None where the result can't be proven.

    While the sweep goes on a set is refuted by one seed alone. What it ends with is tried on all. A
    seed that refutes it takes the sweep back to where this seed was still under the limit, and is
    the first to be asked from then on. If that is nowhere, the initial set was not enough.

    Args:
        start: where the sweep begins.
        selection: the initial set and the limit.
        record: what is known.
        slack: with it the sets that the released code would have tried on all seeds are asked about at the end, as
            far as what is known leaves room for an answer above the limit, see :func:`_check_way`.
    """
    limit, sweeps, went_back = selection.limit, [start], False
    while True:
        record.why, record.careful = Why.REFINEMENT, went_back
        sweep = sweeps[-1]
        if sweep.pending:
            sweeps.append((yield from _next_needed(sweep, limit, record)))
        elif sweep.of_layers:
            sweeps.append(sweep.of_neurons())
        elif (yield from _is_enough(sweep, start, selection, record)):
            break
        else:
            went_back = True
            sweeps = yield from _still_unrefuted(sweeps, selection, record)
            if not sweeps or record.contradicts_monotonicity():
                return None
    if slack is not None:
        yield from _check_way(sweeps, selection.limit, record, slack)
    neurons = sweeps[-1].kept
    spare = yield from spare_neurons(neurons, limit, record)
    return None if spare else neurons


def _check_way(sweeps: Sequence[Sweep], limit: Limit, record: Record, slack: float) -> Search[None]:
    """Ask about the sets that the released code would have tried, and that one seed or none was asked about so far.

    All are larger than what the sweep ended with. On the seed that is the nearest to the limit there, all are asked
    about, on others those for which a similarity above it would not be further from monotone than was seen, times the
    slack. One that is refuted shows in the record that scores are not monotone.
    """
    record.why, record.careful = Why.WAY, True
    passed = [
        before.without(groups)
        for before, after in pairwise(sweeps)
        for groups in range(1, len(before.pending) - len(after.pending) + 1)
        if before.without(groups) >= frozenset(after.kept)
    ]
    hardest = record.highest_seed(sweeps[-1].without(0))
    yield from record.ask([(each, hardest) for each in passed], limit)
    record.slack = slack * record.largest_violation()
    yield from record.ask([(each, seed) for each in passed for seed in record.open_seeds(each, limit)], limit)
    record.slack = inf


def _is_enough(sweep: Sweep, start: Sweep, selection: Selection, record: Record) -> Search[bool]:
    """Whether no seed refutes what the sweep ended with."""
    limit, record.why, record.careful = selection.limit, Why.ENOUGH, True
    if sweep.kept == start.kept:
        if not selection.resolved:
            # Nothing could be spared, and the initial set can't be below its own score.
            return True
        # The initial set need only not be above tau; what is a part of it must be below.
        limit = Limit(limit.value, strict=False)
    return (yield from record.refuting_seed(sweep.without(0), limit)) is None


def _next_needed(sweep: Sweep, limit: Limit, record: Record) -> Search[Sweep]:
    """Drop the likely run of groups, or find the first of them that can't be spared."""
    is_refuted = record.is_closely_refuted if sweep.of_layers else record.is_refuted
    return (yield from drop_likely_run(sweep, lambda groups: is_refuted(sweep.without(groups), limit)))


def drop_likely_run(sweep: Sweep, needs_any: Callable[[int], Search[bool]]) -> Search[Sweep]:
    """Drop the likely run of groups, or find by halving the first of them that can't be spared.

    Args:
        sweep: where it stands.
        needs_any: asks whether the first so many pending groups can't all be spared.
    """
    passes, fails, probe = 0, sweep.likely_run + 1, sweep.likely_run
    while True:
        if (yield from needs_any(probe)):
            fails = probe
        else:
            passes = probe
        if passes == sweep.likely_run:
            return sweep.after(dropped=passes, needed=0)
        if fails - passes == 1:
            return sweep.after(dropped=passes, needed=1)
        probe = (passes + fails) // 2


def _still_unrefuted(sweeps: Sequence[Sweep], selection: Selection, record: Record) -> Search[list[Sweep]]:
    """The part of the way along which the first seed refuted nothing, found by halving."""
    passes, fails = 0, len(sweeps) - 1
    if selection.resolved:
        of_selection = Limit(selection.limit.value, strict=False)
        if (yield from record.is_refuted(sweeps[0].without(0), of_selection)):
            return []
    while fails - passes > 1:
        probe = (passes + fails) // 2
        if (yield from record.is_refuted(sweeps[probe].without(0), selection.limit)):
            fails = probe
        else:
            passes = probe
    return list(sweeps[: passes + 1])


def spare_neurons(neurons: Sequence[Neuron], limit: Limit, record: Record) -> Search[tuple[Neuron, ...]]:
    """The neurons whose absence no seed refutes: one trial a neuron, if there are none.

    Each is spare by itself; without one of them the others may be needed.
    """
    record.why = Why.NOTHING_TO_SPARE
    smaller = [frozenset(neurons) - {neuron} for neuron in neurons]
    pairs = [(each, record.likely_refuter(each, limit)) for each in smaller]
    similarities = yield from record.ask(pairs, limit)
    spare = []
    for neuron, each, similarity in zip(neurons, smaller, similarities, strict=True):
        if limit.holds(similarity) and (yield from record.refuting_seed(each, limit)) is None:
            spare.append(neuron)
    return tuple(spare)


def refine_in_turn(start: Sweep, limit: Limit, record: Record) -> Search[tuple[Neuron, ...]]:
    """The greedy sweep as the released code does it: one group after the other, all seeds of each.

    The next few groups are asked about at once, as if those before them could be spared, as most can.
    """
    sweep = start
    while sweep.pending or sweep.of_layers:
        if not sweep.pending:
            sweep = sweep.of_neurons()
            continue
        run = min(sweep.likely_run, _LONGEST_RUN)
        dropped = yield from _dropped_in_turn([sweep.without(n) for n in range(1, run + 1)], limit, record)
        sweep = sweep.after(dropped, int(dropped < run))
    return sweep.kept


def _dropped_in_turn(sets: Sequence[frozenset[Neuron]], limit: Limit, record: Record) -> Search[int]:
    """How many sets of a chain are under the limit for all seeds before the first that is not."""
    for place, each in enumerate(sets):
        refuter = record.known_refuter(each, limit)
        if refuter is not None:
            record.put_first(refuter)
            sets = sets[:place]
            break
    first = record.seeds[0]
    # The seed that refuted last is asked about the whole chain, the others about what it leaves of it.
    asked = [each for each in sets if first in record.open_seeds(each, limit)]
    similarities = yield from record.ask([(each, first) for each in asked], limit)
    refuted = next((each for each, value in zip(asked, similarities, strict=True) if not limit.holds(value)), None)
    if refuted is not None:
        sets = sets[: sets.index(refuted)]
    pairs = [(each, seed) for each in sets for seed in record.open_seeds(each, limit) if seed != first]
    similarities = yield from record.ask(pairs, limit)
    for (each, seed), similarity in zip(pairs, similarities, strict=True):
        if not limit.holds(similarity):
            record.put_first(seed)
            return sets.index(each)
    return len(sets)
