import pytest
import torch

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.preserve import neuron_costs
from nemo_prune.engine.search import SearchOptions, search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.engine.trials import drive
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof.cost import noise_change
from nemo_prune.settings import LocalizationSettings

NEURONS = [Neuron("down", index) for index in range(8)]


def test_the_cost_of_a_neuron_is_the_change_that_its_mask_makes(pipe):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=3))
    costs = neuron_costs(predictor, ["a cat"])
    assert len(costs) == sum(predictor.sizes.values())
    for neuron in list(costs)[::17]:
        mask = NeuronMask.from_neurons([neuron], predictor.sizes)
        change = noise_change(predictor, ["a cat"], {"one": mask}, num_samples=1)["one"]
        torch.testing.assert_close(torch.tensor(costs[neuron]), torch.tensor(change), rtol=1e-3, atol=1e-7)


def silenced_by_any_two_of(culprits):
    return lambda trials: [0.1 if len(trial.neurons & culprits) >= 2 else 0.9 for trial in trials]


@pytest.mark.parametrize(("widening", "expected"), [(0.0, {1, 3}), (1.0, {3, 6})])
def test_of_neurons_that_do_the_same_the_cheap_ones_stay(widening, expected):
    """Neurons 1, 3 and 6 carry the caption, 6 comes late in the schedule; 1 is dear, 3 and 6 are cheap."""
    costs = dict.fromkeys(NEURONS, 1.0) | {NEURONS[3]: 0.2, NEURONS[6]: 0.1, NEURONS[1]: 5.0}
    schedule = [Candidates(5.0, 0, tuple(NEURONS[:5])), Candidates(4.75, 1, tuple(NEURONS))]
    answer = silenced_by_any_two_of({NEURONS[1], NEURONS[3], NEURONS[6]})
    search = search_neurons(schedule, [0, 1], 0.4, ["down"], SearchOptions(costs, widening))
    assert set(drive(search, answer).neurons) == {NEURONS[index] for index in expected}


def test_many_cheap_neurons_that_cost_more_than_one_dear_do_not_take_its_place():
    """Neuron 1 alone silences the caption, or all others together."""
    costs = dict.fromkeys(NEURONS, 1.0) | {NEURONS[1]: 2.0}
    others = frozenset(NEURONS) - {NEURONS[1]}

    def answer(trials):
        return [0.1 if NEURONS[1] in trial.neurons or others <= trial.neurons else 0.9 for trial in trials]

    search = search_neurons([Candidates(5.0, 0, tuple(NEURONS))], [0, 1], 0.4, ["down"], SearchOptions(costs, 1.0))
    assert drive(search, answer).neurons == (NEURONS[1],)
    costs[NEURONS[1]] = 8.0
    search = search_neurons([Candidates(5.0, 0, tuple(NEURONS))], [0, 1], 0.4, ["down"], SearchOptions(costs, 1.0))
    assert set(drive(search, answer).neurons) == others
