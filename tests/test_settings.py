import pytest

from nemo_prune.errors import SettingsError
from nemo_prune.screening.settings import SieveSettings
from nemo_prune.settings import PRESETS, LocalizationSettings, ModelOptions, Plan


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", "float16"), ("cuda:1", "float16"), ("cpu", "float32"), ("mps", "float32")]
)
def test_a_gpu_computes_in_half_precision_unless_told_otherwise(device, dtype):
    assert ModelOptions().on(device) == ModelOptions(device, dtype)
    assert ModelOptions(dtype="bfloat16").on(device) == ModelOptions(device, "bfloat16")


def test_released_code_is_the_default_and_paper_predicts_at_the_first_timestep():
    assert LocalizationSettings.preset("released-code") == LocalizationSettings()
    assert LocalizationSettings().timestep_index == 1
    assert LocalizationSettings.preset("paper").timestep_index == 0


def test_the_last_cut_is_the_released_codes():
    settings = LocalizationSettings()
    assert (settings.theta - settings.theta_min) / settings.theta_step == 15


def test_preset_takes_changes_and_ignores_none():
    settings = LocalizationSettings.preset("paper", seed=7, num_samples=None)
    assert (settings.seed, settings.num_samples) == (7, PRESETS["paper"].num_samples)


@pytest.mark.parametrize(
    "changes",
    [{"num_samples": 1}, {"threshold": 1.5}, {"timestep_index": 50}, {"theta_step": 0.0}, {"theta_min": 6.0}],
)
def test_senseless_values_are_refused_by_name(changes):
    with pytest.raises(SettingsError, match=next(iter(changes)).replace("_", "[-_]")):
        LocalizationSettings(**changes)


def test_unknown_preset_lists_the_known():
    with pytest.raises(SettingsError, match="released-code, paper"):
        LocalizationSettings.preset("fast")


def test_a_choice_that_does_not_exist_lists_the_others():
    with pytest.raises(SettingsError, match=r"projections.*value or key or both"):
        LocalizationSettings(projections="query")
    with pytest.raises(SettingsError, match=r"sieve.*norm or anisotropy"):
        SieveSettings("cosine")
    with pytest.raises(SettingsError, match=r"merge.*union or minimal"):
        Plan("out", merge="sum")
    with pytest.raises(SettingsError, match=r"int4.*float16"):
        ModelOptions(dtype="int4")
