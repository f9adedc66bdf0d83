"""What a mask changes for ordinary captions, within a limit: thinned for it, or seen as a curve of captions gone."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from nemo_prune.engine.attribution import costs
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons, closed_gates
from nemo_prune.engine.gone import Corpus, judge
from nemo_prune.engine.ordinary import OrdinaryStates, mean_change
from nemo_prune.engine.settling import by_value
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored

# How much memorized captions are held where the whole of it costs more than a limit allows, as shares of that.
HELD_LESS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)


@dataclass(frozen=True)
class CurvePoint:
    """One mask on the way from the whole one to none.

    Attributes:
        neurons: what is pruned.
        change: on ordinary captions, as a share of what everything suppressed changes.
        gone: memorized captions that are gone under it.
        given_up: those that are gone under the whole mask and not under this one.
        hold: how much memorized captions are held near means, as a share of how much they are under the whole one.
    """

    neurons: tuple[Neuron, ...]
    change: float
    gone: tuple[str, ...]
    given_up: tuple[str, ...]
    hold: float = 1.0


def utility_curve(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    neurons: Collection[Neuron],
    points: int = 8,
    advance: Advance = ignored,
    log: LineLog | None = None,
    limit: float = math.inf,
) -> list[CurvePoint]:
    """Let the most costly neurons of a mask act again, step by step, and see which captions that gives up.

    Holding memorized captions costs by itself, however few neurons are pruned. Where no part of the mask is within a
    limit its cheaper half is looked at with these held less and less.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        states: points on ordinary captions' ways.
        neurons: the whole mask.
        points: masks that are looked at, beside the whole one; each costs a sample pass a caption and seed, and one a
            point of ordinary captions' ways.
        advance: called with the points done and their number.
        log: where the captions' measures are kept as they come.
        limit: share of what everything suppressed changes.

    Returns:
        The whole mask first, the empty one last.
    """
    if not neurons:
        return [_look_at(predictor, corpus, states, (), None, log)]
    order, compensation = most_costly_first(predictor, states, neurons), predictor.compensation
    curve = [_look_at(predictor, corpus, states, order, None, log)]
    advance(1, points + 1)
    for point in range(1, points):
        kept = order[round(point * len(order) / points) :]
        if 0 < len(kept) < len(curve[-1].neurons):
            curve.append(_look_at(predictor, corpus, states, kept, curve[0], log))
        advance(point + 1, points + 1)
    try:
        for hold in HELD_LESS if predictor.is_combining and curve[-1].change > limit else ():
            predictor.compensation = compensation.held_by(hold)
            found = _look_at(predictor, corpus, states, order[len(order) // 2 :], curve[0], log)
            curve.append(replace(found, hold=hold))
    finally:
        predictor.compensation = compensation
    curve.append(_look_at(predictor, corpus, states, (), curve[0], log))
    advance(points + 1, points + 1)
    return curve


def within(curve: Sequence[CurvePoint], max_utility_loss: float) -> CurvePoint:
    """The point of a curve that gives up least without changing ordinary captions by more than a limit.

    Args:
        curve: of :func:`utility_curve`; its empty mask is always within.
        max_utility_loss: share of what everything suppressed changes, 0 to 1.
    """
    allowed = [point for point in curve if point.change <= max_utility_loss] or [curve[-1]]
    return min(allowed, key=lambda point: (len(point.given_up), point.change))


def thinned(
    predictor: NoisePredictor, states: OrdinaryStates, neurons: Collection[Neuron], max_utility_loss: float
) -> list[Neuron]:
    """Let the most costly neurons of a mask act again, as few as bring the change on ordinary captions under a limit.

    A few neurons cost most of all (hubs, which all captions use). The many that are left cost little, and make more
    captions go than a mask from which everything is dropped that no prompt needs to be silent.

    Args:
        predictor: the model; what it suppresses is stood in for as a release does.
        states: points on ordinary captions' ways; a sample pass each for every mask that is tried, some ten.
        neurons: the mask.
        max_utility_loss: share of what everything suppressed changes, 0 to 1.

    Returns:
        What stays pruned, at least one neuron.
    """
    if mean_change(predictor, states, neurons) <= max_utility_loss:
        return list(neurons)
    order = most_costly_first(predictor, states, neurons)
    too_few, enough = 0, len(order) - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if mean_change(predictor, states, order[middle:]) <= max_utility_loss:
            enough = middle
        else:
            too_few = middle
    return order[enough:]


def most_costly_first(
    predictor: NoisePredictor, states: OrdinaryStates, neurons: Collection[Neuron], samples: int = 32
) -> list[Neuron]:
    """A mask's neurons in the order of what they cost ordinary captions, by integrated gradients."""
    kept_open = closed_gates(list(neurons), predictor.sizes)
    stride = max(1, len(states) // samples)
    cost = costs(predictor, states, range(0, len(states), stride), held_open=kept_open)
    return by_value(cost.values, predictor, neurons)


def _look_at(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    neurons: Collection[Neuron],
    whole: CurvePoint | None,
    log: LineLog | None,
) -> CurvePoint:
    ordered = tuple(neuron for neuron in all_neurons(predictor.sizes) if neuron in set(neurons))
    gone = tuple(each.prompt for each in judge(predictor, corpus, ordered, log) if each.is_gone)
    before = whole.gone if whole else gone
    return CurvePoint(
        neurons=ordered,
        change=mean_change(predictor, states, ordered),
        gone=gone,
        given_up=tuple(prompt for prompt in before if prompt not in gone),
    )
