"""How long a run will take; tests/test_demo.py holds it against the passes that a run really makes."""

import time
from pathlib import Path

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.progress import Stage
from nemo_prune.settings import LocalizationSettings, Plan
from nemo_prune.stages.estimate import TimeEstimate, duration, estimate_run

PLAN = Plan(out=Path("out"), settings=LocalizationSettings(num_samples=4)).fitted_to(guidance_scale=7.0)


def test_a_pass_is_measured_and_every_stage_is_in_it(pipe):
    predictor = NoisePredictor(pipe, PLAN.settings)
    began = time.perf_counter()
    found = estimate_run(predictor, 10, 60, PLAN)
    assert 0 < found.a_pass < time.perf_counter() - began
    assert predictor.sample_passes == 2 * predictor.batch_size == 16
    assert found.passes[Stage.CALIBRATE] == (240, 240)
    assert {*found.passes} == {
        Stage.CALIBRATE, Stage.WEIGH, Stage.LOCALIZE, Stage.MERGE, Stage.COMPENSATE, Stage.HOLD, Stage.PURSUE,
        Stage.JUDGE, Stage.SCORE_AGAIN, Stage.IMAGES_BEFORE, Stage.IMAGES_AFTER, Stage.ATTACK,
    }  # fmt: skip
    assert found.passes[Stage.ATTACK] == (0, PLAN.verification.evidence_budget)
    assert found.seconds[0] < found.seconds[1] and not found.is_long


def test_a_slow_machine_is_told_in_words_of_a_size_that_fits():
    passes = dict.fromkeys(Stage, (0.0, 0.0)) | {Stage.LOCALIZE: (5_000.0, 95_000.0)}
    slow = TimeEstimate(8.0, passes | {Stage.IMAGES_AFTER: (0.0, 12_500.0)})
    assert slow.is_long
    words = slow.described(500)
    assert "8 s" in words and "500 prompts will take 11 hours" in words and "10 days" in words and "--limit" in words
    assert [duration(seconds) for seconds in (1, 119, 121, 7201, 200_000)] == [
        "1 seconds", "119 seconds", "2 minutes", "2 hours", "2 days",
    ]  # fmt: skip
