"""The initial set (Alg. 3): the first of the nested candidate sets that is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nemo_prune.engine.trials import Limit, Record, Search, Why
from nemo_prune.mask import Neuron

# A set of at most so many neurons per seed is refined at once: all seeds are asked about what is left of it anyway.
_FEW = 4


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

    The other seeds are asked about a large set, whose refinement would be long in vain, and else about the refined
    one alone: if they are under the limit there, they are so under the larger one. Before it is given up, every set
    was refuted by some seed.

    Args:
        schedule: the candidates per step, each set a part of the next.
        record: what is known.
        threshold: tau.
        scored: whether the score of the last set is needed after giving up.
    """
    record.why = Why.SELECTION
    limit = Limit(threshold, strict=False)
    sets = [frozenset(step.neurons) for step in schedule]
    fails, enough = -1, len(sets)
    while True:
        fails, enough = yield from _first_by_one_seed(sets, record, limit, fails, enough)
        small = enough < len(sets) and len(sets[enough]) <= _FEW * len(record.seeds)
        if small or enough == len(sets) or (yield from record.refuting_seed(sets[enough], limit)) is None:
            break
        fails, enough = enough, len(sets)
    if enough == len(sets):
        enough = yield from first_unrefuted(sets, record, limit)
    if enough < len(sets):
        return Selection(schedule[enough], True, Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit, scored))


def _first_by_one_seed(
    sets: Sequence[frozenset[Neuron]], record: Record, limit: Limit, fails: int, enough: int
) -> Search[tuple[int, int]]:
    """The last set that the first seed is known to refute and the one behind it, by doubling, then halving."""
    stride = 1
    while enough - fails > 1:
        probe = min(fails + stride, len(sets) - 1) if enough == len(sets) else (fails + enough) // 2
        stride *= 2
        if (yield from record.is_refuted(sets[probe], limit)):
            fails = probe
        else:
            enough = probe
    return fails, enough


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
