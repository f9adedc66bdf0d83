"""The initial set (Alg. 3): the first of the nested candidate sets that is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nemo_prune.engine.trials import Limit, Record, Search
from nemo_prune.mask import Neuron


class Candidates(NamedTuple):
    """A step of the selection's schedule.

    Attributes:
        theta: the cut on |z|.
        k: number of the most active neurons of each layer that are added.
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


def select(schedule: Sequence[Candidates], record: Record, threshold: float) -> Search[Selection]:
    """Find the first of the nested sets that the first seed does not refute: doubling, then halving.

    The other seeds are asked about the refined set only: seeds under the limit there are also under it
    with this larger set.
    """
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
    if enough < len(sets):
        return Selection(schedule[enough], True, Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit))


def select_in_turn(schedule: Sequence[Candidates], record: Record, threshold: float) -> Search[Selection]:
    """Try one set after the other, as the released code does."""
    limit = Limit(threshold, strict=False)
    for step in schedule:
        if (yield from record.refuting_seed(frozenset(step.neurons), limit)) is None:
            return Selection(step, True, Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit))


def _given_up(schedule: Sequence[Candidates], record: Record, limit: Limit) -> Search[Selection]:
    score = yield from record.score(frozenset(schedule[-1].neurons), limit)
    return Selection(schedule[-1], False, Limit(score, strict=True))
