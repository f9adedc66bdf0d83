"""How long a run will take, from its first passes."""

import time

import pytest

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.settings import LocalizationSettings, VerificationSettings
from nemo_prune.stages.estimate import TimeEstimate, duration, estimate_run


def test_it_is_the_time_of_a_pass_times_the_passes(pipe):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=4))
    verification = VerificationSettings(images_per_prompt=2, num_inference_steps=5, max_prompts=3)
    began = time.perf_counter()
    found = estimate_run(predictor, 10, verification)
    assert 0 < found.a_pass < time.perf_counter() - began
    assert predictor.sample_passes == 8
    assert found.localization[0] == pytest.approx(10 * 4 * found.a_pass)
    assert found.localization[0] < found.localization[1]
    # Three prompts at most, two images each, five steps of two passes, before and after.
    assert found.images == pytest.approx(3 * 2 * 5 * 2 * 2 * found.a_pass)
    assert not found.is_long


def test_a_slow_machine_is_told_in_words_of_a_size_that_fits():
    slow = TimeEstimate(a_pass=8.0, localization=(40_000.0, 760_000.0), images=100_000.0)
    assert slow.is_long
    words = slow.described(500)
    assert "8 s" in words and "500 prompts will take 11 hours" in words and "9 days" in words and "--limit" in words
    assert [duration(seconds) for seconds in (1, 119, 121, 7201, 200_000)] == [
        "1 seconds", "119 seconds", "2 minutes", "2 hours", "2 days",
    ]  # fmt: skip
