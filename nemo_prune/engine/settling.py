"""Whether captions are gone under a mask, asked the hardest first; and a proposal completed until they are."""

from collections.abc import Collection, Sequence

from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import Corpus, Verdict, differences_of, measure_one, verdict
from nemo_prune.mask import Neuron


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
        for position in self._order:
            # Written so that NaN does not pass.
            if not min(self.judge_one(position, neurons).margins.values()) >= margin:
                self._order.remove(position)
                self._order.insert(0, position)
                return False
        return True

    def judge_one(self, position: int, neurons: Collection[Neuron]) -> Verdict:
        """The verdict on one caption, one sample pass a seed."""
        embeds = self.corpus.memorized.prompt_embeds[position]
        differences = differences_of(self.predictor, embeds, self.corpus.seeds, neurons)
        return verdict(position, measure_one(position, differences, self.corpus), self.corpus)


def complete(jury: Jury, neurons: Collection[Neuron], order: Sequence[Neuron], margin: float = 0.0) -> list[Neuron]:
    """Add neurons until all captions are gone that the jury asks about, twice as many each time.

    Args:
        jury: judges the captions; with everything suppressed they are gone.
        neurons: the proposal.
        order: all neurons, those first that do most.
        margin: by how much captions must be gone.
    """
    suppressed, number = dict.fromkeys(neurons), 1
    waiting = [neuron for neuron in order if neuron not in suppressed]
    while waiting and not jury.all_gone(suppressed, margin):
        suppressed |= dict.fromkeys(waiting[:number])
        waiting, number = waiting[number:], 2 * number
    return list(suppressed)


def by_value(values: Tensor, predictor: NoisePredictor) -> list[Neuron]:
    """All neurons, those of the highest values first."""
    neurons = all_neurons(predictor.sizes)
    return [neurons[position] for position in values.argsort(descending=True, stable=True).tolist()]
