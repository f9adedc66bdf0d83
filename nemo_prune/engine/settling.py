"""From a proposal to a mask: complete it where a caption is not gone, then spare what can be spared."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import Corpus, Verdict, differences_of, judge, measure_one, verdict
from nemo_prune.mask import Neuron

Advance = Callable[[int, int], None]
# A caption is at its limit when its margin is this far from it at most.
_ROUNDS = 12


@dataclass(frozen=True)
class SettledGates:
    """A mask under which captions are gone, of which no tried part can be spared.

    Attributes:
        neurons: what is pruned.
        remaining: captions that are not gone, with the reasons; some no mask of these layers makes go.
    """

    neurons: tuple[Neuron, ...]
    remaining: tuple[Verdict, ...]


class Jury:
    """Judges masks caption by caption and ends with the first that is not gone; the hardest is asked first.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        excused: captions that need not be gone.
    """

    def __init__(self, predictor: NoisePredictor, corpus: Corpus, excused: Collection[str] = ()) -> None:
        self.predictor, self.corpus = predictor, corpus
        self._order = [i for i, prompt in enumerate(corpus.memorized.prompts) if prompt not in excused]

    def all_gone(self, neurons: Collection[Neuron], margin: float = 0.0) -> bool:
        """Whether all captions are gone under a mask, with room to spare."""
        for position in self._order:
            if min(self.judge_one(position, neurons).margins.values()) < margin:
                self._order.remove(position)
                self._order.insert(0, position)
                return False
        return True

    def judge_one(self, position: int, neurons: Collection[Neuron]) -> Verdict:
        """The verdict on one caption, one sample pass a seed."""
        embeds = self.corpus.memorized.prompt_embeds[position]
        differences = differences_of(self.predictor, embeds, self.corpus.seeds, neurons)
        return verdict(position, measure_one(position, differences, self.corpus), self.corpus)


def complete(
    predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron], order: Sequence[Neuron]
) -> SettledGates:
    """Add neurons until all captions are gone that can be, twice as many each time.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        neurons: the proposal.
        order: all neurons, those first that do most for their cost.
    """
    excused = {each.prompt for each in judge(predictor, corpus, all_neurons(predictor.sizes)) if not each.is_gone}
    suppressed, waiting, number = set(neurons), [each for each in order if each not in set(neurons)], 1
    jury = Jury(predictor, corpus, excused)
    while waiting and not jury.all_gone(suppressed):
        suppressed.update(waiting[:number])
        waiting, number = waiting[number:], 2 * number
    return _settled(predictor, corpus, suppressed)


def spare(
    jury: Jury,
    neurons: Collection[Neuron],
    order: Sequence[Neuron],
    margin: float = 0.0,
    advance: Advance = lambda done, total: None,
) -> list[Neuron]:
    """Let neurons act again as long as all captions stay gone; in groups, which are halved where they are needed.

    Args:
        jury: judges the captions.
        neurons: a mask under which they are gone.
        order: in which its neurons are tried; the most costly first.
        margin: by how much captions must stay gone.
        advance: called with the neurons that were decided and their number.
    """
    kept, tried = set(neurons), [neuron for neuron in order if neuron in set(neurons)]
    start, size = 0, 1
    while start < len(tried):
        group = tried[start : start + size]
        if jury.all_gone(kept.difference(group), margin):
            kept.difference_update(group)
            start, size = start + len(group), 2 * size
        elif len(group) == 1:
            start, size = start + 1, 1
        else:
            size = len(group) // 2
        advance(min(start, len(tried)), len(tried))
    return [neuron for neuron in tried if neuron in kept]


def by_value(values: Tensor, predictor: NoisePredictor) -> list[Neuron]:
    """All neurons, those of the highest values first."""
    neurons = all_neurons(predictor.sizes)
    return [neurons[position] for position in values.argsort(descending=True, stable=True).tolist()]


def _settled(predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron]) -> SettledGates:
    ordered = tuple(neuron for neuron in all_neurons(predictor.sizes) if neuron in set(neurons))
    remaining = tuple(each for each in judge(predictor, corpus, ordered) if not each.is_gone)
    return SettledGates(ordered, remaining)
