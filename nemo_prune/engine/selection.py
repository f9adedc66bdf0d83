"""The initial set (Alg. 3): the first of the nested candidate sets that is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nemo_prune.engine.trials import Limit, Record, Search, Why
from nemo_prune.mask import Neuron


class Candidates(NamedTuple):
    """A step of the selection's schedule.

    Attributes:
        theta: the cut on |z|.
        k: how many of the most active neurons of each layer are added.
        neurons: the candidates, in the order in which the refinement tests them within a layer.
    """

    theta: float
    k: int
    neurons: tuple[Neuron, ...]


@dataclass(frozen=True)
class Selection:
    """Where the selection ended, and what the refinement must stay under.

    The limit is tau, or after giving up the score that was reached.
    """

    step: Candidates
    resolved: bool
    limit: Limit


def select(schedule: Sequence[Candidates], record: Record, threshold: float, scored: bool = True) -> Search[Selection]:
    """Search the nested sets for the first that the first seed does not refute: doubling, then halving.

    The other seeds are asked about the refined set alone: if they are under the limit there, they
    are so under this larger one. Before it is given up, every set was refuted by some seed.

    Args:
        schedule: the candidates per step, each set a part of the next.
        record: what is known.
        threshold: tau.
        scored: whether the score of the last set is needed after giving up.
    """
    record.why = Why.SELECTION
    limit = Limit(threshold, strict=False)
    sets = [frozenset(step.neurons) for step in schedule]
    fails, enough, stride = -1, len(sets), 1
    while enough - fails > 1:
        probe = min(fails + stride, len(sets) - 1) if enough == len(sets) else (fails + enough) // 2
        stride *= 2
        if (yield from record.is_refuted(sets[probe], limit)):
            fails = probe
        else:
            enough = probe
    if enough == len(sets):
        enough = yield from first_unrefuted(sets, record, limit)
    if enough < len(sets):
        return Selection(schedule[enough], True, Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit, scored))


def first_unrefuted(sets: Sequence[frozenset[Neuron]], record: Record, limit: Limit) -> Search[int]:
    """The first set that no seed refutes, or their number: all of them are asked at once, on one seed."""
    similarities = yield from record.ask([(each, record.seeds[0]) for each in sets], limit)
    for place, (each, similarity) in enumerate(zip(sets, similarities, strict=True)):
        if limit.holds(similarity) and (yield from record.refuting_seed(each, limit)) is None:
            return place
    return len(sets)


def select_in_turn(
    schedule: Sequence[Candidates], record: Record, threshold: float, scored: bool = True
) -> Search[Selection]:
    """Try one set after the other, as the released code does; the arguments are those of :func:`select`."""
    limit = Limit(threshold, strict=False)
    for step in schedule:
        if (yield from record.refuting_seed(frozenset(step.neurons), limit)) is None:
            return Selection(step, True, Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit, scored))


def _given_up(schedule: Sequence[Candidates], record: Record, limit: Limit, scored: bool) -> Search[Selection]:
    if scored:
        limit = Limit((yield from record.joint_score(frozenset(schedule[-1].neurons), limit)), strict=True)
    return Selection(schedule[-1], False, limit)
