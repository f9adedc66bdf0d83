import pytest
import torch
from torch import nn

from nemo_prune.engine.activations import ActivationStatistics, ActivationStatisticsFitter, neuron_activations
from nemo_prune.errors import MaskError


def test_activation_is_the_mean_of_absolute_values_over_all_positions():
    layer = nn.Linear(3, 5, bias=False)
    embeds = torch.randn(2, 7, 3)
    expected = torch.einsum("bpi,oi->bpo", embeds, layer.weight).abs().mean(1)
    torch.testing.assert_close(neuron_activations({"v": layer}, embeds)["v"], expected)


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [7, 1, 32], [20, 20]])
def test_streamed_statistics_equal_those_of_one_batch(sizes):
    values = torch.randn(40, 6) * 3 + 100
    fitter = ActivationStatisticsFitter()
    for batch in values.split(sizes):
        fitter.update({"v": batch})
    statistics = fitter.statistics
    torch.testing.assert_close(statistics.mean["v"], values.mean(0))
    torch.testing.assert_close(statistics.std["v"], values.std(0))
    assert statistics.num_prompts == 40


def test_z_scores_count_deviations_and_survive_a_neuron_that_never_varied():
    statistics = ActivationStatistics({"v": torch.tensor([1.0, 1.0, 2.0])}, {"v": torch.tensor([0.5, 0.0, 0.0])}, 9)
    z = statistics.z_scores({"v": torch.tensor([2.0, 1.0, 3.0])})["v"]
    assert z.tolist() == [2.0, 0.0, float("inf")]


def test_statistics_of_another_model_are_refused():
    statistics = ActivationStatistics({"v": torch.ones(3)}, {"v": torch.ones(3)}, 9)
    for name, size in (("v", 4), ("w", 3)):
        with pytest.raises(MaskError, match="do not fit"):
            statistics.z_scores({name: torch.ones(size)})
