"""What suppressing each neuron costs ordinary captions, and how much a search takes it into account."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_prune.engine.attribution import costs
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.ordinary import walk_ordinary
from nemo_prune.mask import Neuron

# Points on the way of each ordinary caption, gradients at each of them, and the seed of the ways.
_POINTS, _GRADIENTS, _SEED = 2, 2, 2001


@dataclass(frozen=True)
class Preserve:
    """How far the search departs from the paper to spare ordinary captions.

    Attributes:
        costs: neuron -> what it costs ordinary captions to suppress it. A merge that drops neurons tries the most
            costly ones first.
        strength: 0 to 1: how far the candidates of a prompt are widened, which lets its search spare costly ones; at
            0 its search is the paper's.
    """

    costs: Mapping[Neuron, float]
    strength: float


def neuron_costs(predictor: NoisePredictor, texts: Sequence[str]) -> dict[Neuron, float]:
    """What each neuron costs ordinary captions, for all of them by a few backward passes.

    It takes 20 sample passes a caption, whatever the number of neurons: 2 a point on its way from noise to image, and
    8 for the gradients there.

    Args:
        predictor: the model.
        texts: ordinary prompts.

    Returns:
        Neuron -> its share of the change that everything suppressed makes, see
        :func:`~nemo_prune.engine.attribution.costs`.
    """
    states = walk_ordinary(predictor, texts, _POINTS, _SEED)
    values = costs(predictor, states, range(len(states)), _GRADIENTS).values
    return dict(zip(all_neurons(predictor.sizes), values.tolist(), strict=True))
