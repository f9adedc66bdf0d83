import pytest
import torch
from diffusers import UNet2DConditionModel

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.preserve import neuron_costs
from nemo_prune.engine.search import SearchOptions, search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.engine.trials import drive
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof.cost import noise_change
from nemo_prune.settings import LocalizationSettings

NEURONS = [Neuron("down", index) for index in range(8)]


def test_dear_neurons_change_more_than_cheap_ones_and_few_passes_tell_them_apart(pipe):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=3))
    texts = ["a cat", "a red ring", "two dogs"]
    costs = neuron_costs(predictor, texts)
    assert predictor.sample_passes == len(texts) * (4 + 2 * (2 * 3 + 2))
    assert len(costs) == sum(predictor.sizes.values()) and min(costs.values()) >= 0
    ordered, size = sorted(costs, key=costs.get), len(costs) // 5
    masks = {
        name: NeuronMask.from_neurons(part, predictor.sizes)
        for name, part in {"cheap": ordered[:size], "dear": ordered[-size:]}.items()
    }
    change = noise_change(predictor, ["a green square"], masks)
    assert change["dear"] > 1.5 * change["cheap"] > 0


def test_where_memory_is_short_fewer_samples_give_the_same_costs(pipe, monkeypatch):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=3))
    expected = neuron_costs(predictor, ["a cat", "a red ring"])
    forward = UNet2DConditionModel.forward

    def short(unet, sample, *arguments, **named):
        if len(sample) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(unet, sample, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", short)
    found = neuron_costs(NoisePredictor(pipe, LocalizationSettings(num_samples=3)), ["a cat", "a red ring"])
    assert found.keys() == expected.keys()
    torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=1e-3, atol=1e-6)


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
