"""Memorized captions that a mask leaves are held harder, each by itself, as long as ordinary captions can afford it.

All memorized captions share one weight against the ordinary ones (:mod:`nemo_prune.engine.compensation`), so that each
is held the less the more there are. Most need less than their share. So those count for more that are not gone, or
whose images copy, and those that are copied; round after round, as in boosting. The others stay as they are.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from statistics import mean

from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.completing import Limits, Looks, named, no_looks
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import Corpus, judge
from nemo_prune.engine.ordinary import OrdinaryStates, mean_change
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.progress import Advance, ignored

# By what factor a caption counts for more with every round in which it is not gone; rounds after the first.
HARDER, ROUNDS = 4.0, 4


@dataclass(frozen=True)
class HeldRound:
    """How memorized captions were held, and what that did.

    Attributes:
        weights: memorized caption -> how much more than at first it counts.
        change: on ordinary captions, as a share of what everything suppressed changes.
        not_gone: memorized captions that are not gone, by their predictions.
        copying: memorized captions whose images copy or come close to that, and those that are copied.
        num_copies: captions whose images really copy, memorized or ordinary.
    """

    weights: dict[str, float]
    change: float
    not_gone: tuple[str, ...]
    copying: tuple[str, ...]
    num_copies: int

    @property
    def left(self) -> frozenset[str]:
        """Memorized captions that are to be held harder."""
        return frozenset((*self.not_gone, *self.copying))

    @property
    def harder(self) -> dict[str, float]:
        """The weights of the next round."""
        return self.weights | {prompt: HARDER * self.weights[prompt] for prompt in self.left}


def hold_harder(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    neurons: Collection[Neuron],
    limits: Limits,
    copies: Looks = no_looks,
    log: LineLog | None = None,
    judged: LineLog | None = None,
    advance: Advance = ignored,
) -> tuple[HeldRound, HeldRound]:
    """Hold captions harder that are not gone under a mask, until all are or ordinary ones change by more than a limit.

    Where images really copy the limit is another one, because to complete the mask for these would cost more. The
    predictor's compensation is replaced by that of the round with the fewest copies; of several by that within the
    limit, the one that leaves fewest captions, the first.

    A round takes a sample pass a memorized caption and seed, as many a caption that is held harder as its moments take,
    one a point of the ordinary captions' ways, and a look at images.

    Args:
        predictor: the model; its compensation combines kept neurons.
        corpus: what captions are judged against.
        states: points on ordinary captions' ways.
        neurons: the mask.
        limits: of the change on ordinary captions.
        copies: draws images under a mask and says what copied.
        log: where the rounds are kept as they end.
        judged: where the measures of the captions are kept.
        advance: called with the rounds done and their number.

    Returns:
        The first round, with all captions held alike, and the one that was taken; the same, if nothing was better.
    """
    first, rounds, mask = predictor.compensation, _kept(log), NeuronMask.from_neurons(neurons, predictor.sizes)
    held = dict.fromkeys(corpus.memorized.prompts, 1.0)

    def hold(weights: dict[str, float]) -> None:
        # What they count more than at first is all that has to be measured.
        more = attended_moments(predictor, list(weights), [each - 1 for each in weights.values()])
        times = mean(weights.values())
        moments = {name: each.mixed_with(more[name], 1 - 1 / times) for name, each in first.memorized.items()}
        predictor.compensation = replace(first, memorized=moments, hold=times)

    def judged_round() -> HeldRound:
        change = mean_change(predictor, states, neurons)
        if rounds and change > limit():
            return replace(rounds[-1], weights=held, change=change)
        not_gone = [each.prompt for each in judge(predictor, corpus, neurons, judged) if not each.is_gone]
        seen = copies(mask)
        copying = tuple(prompt for prompt in held if prompt in named(seen))
        return HeldRound(held, change, tuple(not_gone), copying, sum(not each.is_close for each in seen))

    def limit() -> float:
        """What ordinary captions may change by in the next round."""
        return limits.copying if rounds[-1].num_copies else limits.left

    while not rounds or (rounds[-1].left and rounds[-1].change <= limit() and len(rounds) <= ROUNDS):
        if rounds:
            held = rounds[-1].harder
            hold(held)
        rounds.append(judged_round())
        if log is not None:
            log.append(asdict(rounds[-1]))
        advance(len(rounds), ROUNDS + 1)
    best = min(
        (each for each in rounds if each.change <= limits.copying),
        key=lambda each: (each.num_copies, each.change > limits.left, len(each.left)),
        default=rounds[0],
    )
    if best.weights != held:
        predictor.compensation = first
        if best is not rounds[0]:
            hold(best.weights)
    return rounds[0], best


def _kept(log: LineLog | None) -> list[HeldRound]:
    """The rounds that ended before a stop."""
    return [HeldRound(**each | {name: tuple(each[name]) for name in ("not_gone", "copying")}) for each in log or ()]
