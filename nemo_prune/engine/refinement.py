"""The refined set (Alg. 4): the neurons of the initial set that cannot be dropped, in the order of the greedy sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

from nemo_prune.engine.selection import Candidates, Selection
from nemo_prune.engine.trials import Limit, Record, Search
from nemo_prune.mask import Neuron


@dataclass(frozen=True)
class Sweep:
    """The state of the greedy sweep.

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
        """What remains suppressed when the first pending groups, so many, are switched back on."""
        return frozenset(self.kept).difference(*self.pending[:groups])

    def after(self, dropped: int, needed: int) -> "Sweep":
        """The sweep after dropping a number of groups and finding the next ones to be needed."""
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
        """How many groups at once are dispensable with about even odds, judging by the groups so far."""
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


def refine(start: Sweep, selection: Selection, record: Record) -> Search[tuple[Neuron, ...] | None]:
    """The greedy sweep, with runs dropped at once; None if the result cannot be proven.

    During the sweep a single seed tests each set. The final set is tried on all seeds. A seed that refutes it
    takes the sweep back to the last set that this seed did not refute, and is asked first from then on. If there
    is no such set, the initial set was not enough.
    """
    limit, sweeps = selection.limit, [start]
    while True:
        sweep = sweeps[-1]
        if sweep.pending:
            sweeps.append((yield from _next_needed(sweep, limit, record)))
        elif sweep.of_layers:
            sweeps.append(sweep.of_neurons())
        elif (yield from _is_enough(sweep, start, selection, record)):
            break
        else:
            sweeps = yield from _still_unrefuted(sweeps, selection, record)
            if not sweeps or record.contradicts_monotonicity():
                return None
    neurons = sweeps[-1].kept
    proven = yield from _none_can_be_spared(neurons, limit, record)
    return neurons if proven else None


def _is_enough(sweep: Sweep, start: Sweep, selection: Selection, record: Record) -> Search[bool]:
    """Whether no seed refutes what the sweep ended with."""
    limit = selection.limit
    if sweep.kept == start.kept:
        if not selection.resolved:
            # Nothing could be dropped, and the initial set cannot be below its own score.
            return True
        # The initial set may reach tau exactly; any part of it must be strictly below.
        limit = Limit(limit.value, strict=False)
    return (yield from record.refuting_seed(sweep.without(0), limit)) is None


def _next_needed(sweep: Sweep, limit: Limit, record: Record) -> Search[Sweep]:
    """Drop the likely run of groups, or find the first of them that is needed."""
    passes, fails = 0, sweep.likely_run + 1
    probe = sweep.likely_run
    is_refuted = record.is_closely_refuted if sweep.of_layers else record.is_refuted
    while True:
        if (yield from is_refuted(sweep.without(probe), limit)):
            fails = probe
        else:
            passes = probe
        if passes == sweep.likely_run:
            return sweep.after(dropped=passes, needed=0)
        if fails - passes == 1:
            return sweep.after(dropped=passes, needed=1)
        probe = (passes + fails) // 2


def _still_unrefuted(sweeps: Sequence[Sweep], selection: Selection, record: Record) -> Search[list[Sweep]]:
    """The steps up to which the first seed refuted nothing, found by halving."""
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


def _none_can_be_spared(neurons: Sequence[Neuron], limit: Limit, record: Record) -> Search[bool]:
    """Whether some seed refutes the set without each neuron: one trial per neuron in the best case."""
    smaller = [frozenset(neurons) - {neuron} for neuron in neurons]
    pairs = [(each, record.likely_refuter(each, limit)) for each in smaller]
    similarities = yield from record.ask(pairs, limit)
    for each, similarity in zip(smaller, similarities, strict=True):
        if limit.holds(similarity) and (yield from record.refuting_seed(each, limit)) is None:
            return False
    return True


def refine_in_turn(start: Sweep, limit: Limit, record: Record) -> Search[tuple[Neuron, ...]]:
    """The greedy sweep as the released code does it: one group after the other, see :meth:`Record.refuting_seed`."""
    sweep = start
    while sweep.pending or sweep.of_layers:
        if not sweep.pending:
            sweep = sweep.of_neurons()
            continue
        seed = yield from record.refuting_seed(sweep.without(1), limit)
        sweep = sweep.after(1, 0) if seed is None else sweep.after(0, 1)
    return sweep.kept
