"""Whether captions are gone under a mask, asked the hardest first; and a proposal completed until they are."""

from collections.abc import Callable, Collection, Sequence
from functools import cache

from torch import Tensor

from nemo_prune.engine.attribution import benefits, costs
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons, closed_gates
from nemo_prune.engine.gone import Corpus, Verdict, verdict
from nemo_prune.engine.measures import measure_one
from nemo_prune.engine.ordinary import OrdinaryStates
from nemo_prune.engine.views import Views, differences_of
from nemo_prune.files.work import LineLog, Replay
from nemo_prune.mask import Neuron

# Points on ordinary captions' ways whose gradients are taken.
_COST_POINTS = 32
# What a neuron costs at least, as a share of the mean: below, a cost is not told from none.
_LEAST_COST = 0.1


class Jury:
    """Judges masks caption by caption and ends with the first that is not gone, which is asked first from then on.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        excused: captions that need not be gone.
    """

    def __init__(self, predictor: NoisePredictor, corpus: Corpus, excused: Collection[str] = ()) -> None:
        self.predictor, self.corpus = predictor, corpus
        self._order = [i for i, prompt in enumerate(corpus.memorized.prompts) if prompt not in excused]

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the captions that it asks about, in the corpus."""
        return tuple(sorted(self._order))

    def all_gone(self, neurons: Collection[Neuron], margin: float = 0.0) -> bool:
        """Whether all captions are gone under a mask, with room to spare."""
        return self.first_not_gone(neurons, margin) is None

    def first_not_gone(self, neurons: Collection[Neuron], margin: float = 0.0) -> int | None:
        """The position of a caption that is not gone under a mask, None where all are."""
        for position in self._order:
            if not self.is_gone(position, neurons, margin):
                self.ask_first(position)
                return position
        return None

    def ask_first(self, position: int) -> None:
        """Ask about a caption first from now on."""
        self._order.remove(position)
        self._order.insert(0, position)

    def is_gone(self, position: int, neurons: Collection[Neuron], margin: float = 0.0) -> bool:
        """Whether one caption is gone, with room to spare."""
        # Written so that NaN does not pass.
        return min(self.judge_one(position, neurons).margins.values()) >= margin

    def judge_one(self, position: int, neurons: Collection[Neuron]) -> Verdict:
        """The verdict on one caption, one sample pass a seed."""
        corpus = self.corpus
        embeds = corpus.memorized.prompt_embeds[position : position + 1]
        (differences,) = differences_of(self.predictor, embeds, corpus.seeds, neurons)
        return verdict(position, measure_one(position, differences, corpus.memorized, corpus.betas), corpus)


def complete(
    predictor: NoisePredictor,
    jury: Jury,
    states: OrdinaryStates,
    neurons: Collection[Neuron],
    margin: float = 0.0,
    log: LineLog | None = None,
) -> list[Neuron]:
    """Add neurons until all captions are gone that the jury asks about: for each that is not, those that do most.

    What a neuron does against the reason why a caption is not gone, over what it costs ordinary ones, is asked anew for
    each caption. Any order that does not ask adds hubs: on a model that was trained without terms against them the
    change rose from .36 to .89.

    Args:
        predictor: the model.
        jury: judges the captions; with everything suppressed they are gone.
        states: points on ordinary captions' ways.
        neurons: the proposal.
        margin: by how much captions must be gone.
        log: where what is added for each caption is kept.
    """
    suppressed, decided = list(dict.fromkeys(neurons)), Replay(log)
    cost = cache(lambda: costs_of_completing(predictor, states))

    def next_caption() -> list:
        """A caption that is not gone, the neurons that it needs, and whether it would take more; or nothing."""
        position = jury.first_not_gone(suppressed, margin)
        if position is None:
            return []
        resembled = _resembled(jury, position, suppressed)
        waiting = most_worth(predictor, jury.corpus.memorized, position, resembled, suppressed, cost())
        needed = first_enough(waiting, lambda more: jury.is_gone(position, [*suppressed, *more], margin))
        return [position, needed, len(needed) == len(waiting)]

    while found := decided(next_caption):
        position, needed, is_beyond = found
        # As the jury does by itself, unless the decision was made before a stop.
        jury.ask_first(position)
        suppressed += [Neuron(*each) for each in needed]
        if is_beyond:
            break
    return suppressed


def costs_of_completing(predictor: NoisePredictor, states: OrdinaryStates) -> Tensor:
    """What each neuron costs ordinary captions, [neurons], at some points of their ways."""
    return costs(predictor, states, range(0, len(states), max(1, len(states) // _COST_POINTS))).values


def most_worth(
    predictor: NoisePredictor,
    memorized: Views,
    position: int,
    resembled: int,
    suppressed: Sequence[Neuron],
    cost: Tensor,
) -> list[Neuron]:
    """Neurons that are not suppressed yet, those first that do most against a resemblance for what they cost.

    Args:
        predictor: the model.
        memorized: memorized captions, nothing suppressed.
        position: of the caption.
        resembled: position of the caption to whose unsuppressed prediction it is to become less similar.
        suppressed: what is suppressed already.
        cost: of every neuron, [neurons].
    """
    closed = 1 - closed_gates(suppressed, predictor.sizes)
    benefit = benefits(predictor, memorized, position, closed=closed, resembled=resembled)
    order, done = by_value(rank_neurons(benefit.values, cost), predictor), set(suppressed)
    return [neuron for neuron in order if neuron not in done]


def first_enough(waiting: Sequence[Neuron], are_enough: Callable[[Sequence[Neuron]], bool]) -> Sequence[Neuron]:
    """The first of some neurons that are enough, their number doubled, then halved; all of them where none are."""
    too_few, number = 0, 1
    while number < len(waiting) and not are_enough(waiting[:number]):
        too_few, number = number, min(2 * number, len(waiting))
    while number - too_few > 1:
        middle = (too_few + number) // 2
        if are_enough(waiting[:middle]):
            number = middle
        else:
            too_few = middle
    return waiting[:number]


def without_costly(
    neurons: Sequence[Neuron], cost: Tensor, predictor: NoisePredictor, are_enough: Callable[[Sequence[Neuron]], bool]
) -> list[Neuron]:
    """Some neurons that are enough, without the most costly ones that can be spared; half of them are tried at once.

    Args:
        neurons: that are enough.
        cost: of every neuron, [neurons].
        predictor: the model.
        are_enough: whether others are.
    """
    kept, waiting = list(neurons), by_value(cost, predictor, neurons)
    size = len(waiting) // 2
    while waiting and size:
        left = [neuron for neuron in kept if neuron not in waiting[:size]]
        if are_enough(left):
            kept, waiting = left, waiting[size:]
        elif size > 1:
            size //= 2
        else:
            waiting = waiting[1:]
    return kept


def _resembled(jury: Jury, position: int, neurons: Collection[Neuron]) -> int:
    """The caption to whose unsuppressed prediction another one is to become less similar: mostly itself."""
    found = jury.judge_one(position, neurons)
    others = [margin for margin in (found.similarity_margin, found.agreement_margin) if margin is not None]
    if found.resemblance_margin >= min(others):
        return position
    return jury.corpus.memorized.prompts.index(found.nearest)


def rank_neurons(benefit: Tensor, cost: Tensor) -> Tensor:
    """Benefit over cost of every neuron, [neurons]; below 0 where suppressing it does harm."""
    return benefit / (cost + _LEAST_COST * cost.mean() + 1e-12)


def by_value(values: Tensor, predictor: NoisePredictor, among: Collection[Neuron] | None = None) -> list[Neuron]:
    """All neurons, or those among some, those of the highest values first."""
    neurons = all_neurons(predictor.sizes)
    chosen = set(neurons if among is None else among)
    order = (neurons[position] for position in values.argsort(descending=True, stable=True).tolist())
    return [neuron for neuron in order if neuron in chosen]
