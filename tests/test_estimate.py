"""How long a run will take: its passes beside those that it really makes."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.budget import thinned
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, localize_prompts
from nemo_prune.engine.merge import settle_mask
from nemo_prune.engine.pursuit import PursuitSettings
from nemo_prune.engine.scorer import Scorer
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_pipeline
from nemo_prune.progress import Stage
from nemo_prune.run import AFFORDED
from nemo_prune.settings import LocalizationSettings, Plan, VerificationSettings
from nemo_prune.stages.estimate import TimeEstimate, duration, estimate_run, passes_of_stages

PLAN = Plan(out=Path("out"), settings=LocalizationSettings(num_samples=4)).fitted_to(guidance_scale=7.0)


def test_a_pass_is_measured_and_every_stage_is_in_it(pipe):
    predictor = NoisePredictor(pipe, PLAN.settings)
    began = time.perf_counter()
    found = estimate_run(predictor, 10, 60, PLAN)
    assert 0 < found.a_pass < time.perf_counter() - began
    assert predictor.sample_passes == 2 * predictor.batch_size == 16
    assert found.passes[Stage.CALIBRATE] == (240, 240)
    assert {*found.passes} == {
        Stage.CALIBRATE, Stage.WEIGH, Stage.LOCALIZE, Stage.MERGE, Stage.COMPENSATE, Stage.PURSUE, Stage.JUDGE,
        Stage.SCORE_AGAIN, Stage.IMAGES_BEFORE, Stage.IMAGES_AFTER, Stage.ATTACK,
    }  # fmt: skip
    assert found.passes[Stage.ATTACK] == (0, PLAN.verification.evidence_budget)
    assert found.seconds[0] < found.seconds[1] and not found.is_long


@pytest.mark.slow
def test_a_run_on_the_demo_makes_about_as_many_passes():
    pipe = load_pipeline(demo_folder(), "cpu", torch.float32)
    scorer = Scorer(NoisePredictor(pipe, LocalizationSettings()))
    ordinary, texts = (
        [prompt.text for prompt in read_prompts(demo_folder() / name)] for name in (CALIBRATION_FILE, PROMPTS_FILE)
    )
    calibration = calibrate(scorer, ordinary[:50])
    plan = Plan(out=Path("out"), verification=VerificationSettings(guidance_scale=3.0))
    expected = passes_of_stages(sum(scorer.predictor.sizes.values()), len(texts), 50, plan)
    assert expected[Stage.CALIBRATE][1] == scorer.sample_passes
    localizer, made = Localizer(scorer, calibration, calibration.threshold), {}
    before = scorer.sample_passes
    found = list(localize_prompts(localizer, texts))
    made[Stage.LOCALIZE] = scorer.sample_passes - before
    states = PursuitSettings().states(scorer.predictor, ordinary)
    settle_mask(localizer, found, thin=partial(thinned, scorer.predictor, states, max_utility_loss=AFFORDED))
    made[Stage.MERGE] = scorer.sample_passes - before - made[Stage.LOCALIZE]
    for stage, passes in made.items():
        assert passes / 2 <= expected[stage][1] <= 2 * passes, stage


def test_a_slow_machine_is_told_in_words_of_a_size_that_fits():
    passes = dict.fromkeys(Stage, (0.0, 0.0)) | {Stage.LOCALIZE: (5_000.0, 95_000.0)}
    slow = TimeEstimate(8.0, passes | {Stage.IMAGES_AFTER: (0.0, 12_500.0)})
    assert slow.is_long
    words = slow.described(500)
    assert "8 s" in words and "500 prompts will take 11 hours" in words and "10 days" in words and "--limit" in words
    assert [duration(seconds) for seconds in (1, 119, 121, 7201, 200_000)] == [
        "1 seconds", "119 seconds", "2 minutes", "2 hours", "2 days",
    ]  # fmt: skip
