"""Harder ground than the demo: its reference, which was trained without the terms that make it localizable."""

import pytest
import torch

from benchmarks.merging import REFERENCE_MODEL
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import FRESH_SEED, gather_corpus, judge
from nemo_prune.engine.learned import LearningSettings
from nemo_prune.engine.localize import Localizer, localize_prompts
from nemo_prune.engine.merge import union_mask
from nemo_prune.engine.ordinary import mean_change, walk_ordinary
from nemo_prune.engine.pursuit import PursuitSettings, pursue
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.views import Seeds
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE
from nemo_prune.models.source import load_pipeline
from nemo_prune.settings import LocalizationSettings


@pytest.mark.slow
def test_learned_gates_make_captions_go_at_less_change_than_the_papers_union():
    pipe = load_pipeline(REFERENCE_MODEL, "cpu", torch.float32)
    predictor = NoisePredictor(pipe, LocalizationSettings())
    prompts = [prompt.text for prompt in read_prompts(REFERENCE_MODEL / PROMPTS_FILE)][:3]
    usual, test = ([p.text for p in read_prompts(REFERENCE_MODEL / name)] for name in (CALIBRATION_FILE, TEST_FILE))
    calibration = calibrate(Scorer(predictor), usual[:50])
    localizer = Localizer(Scorer(predictor), calibration, calibration.threshold)
    union = union_mask(list(localize_prompts(localizer, prompts)), predictor.sizes)
    settings = PursuitSettings(learning=LearningSettings(steps=80), more_seeds=5)
    learned = pursue(predictor, prompts, usual, calibration.threshold, settings).best.mask
    # Seeds and captions that no search has seen.
    states = walk_ordinary(predictor, test[:8], 4, FRESH_SEED)
    changes = [mean_change(predictor, states, mask.neurons) for mask in (learned, union)]
    corpus = gather_corpus(predictor, prompts, test[8:16], Seeds.draw(predictor, FRESH_SEED, 5), calibration.threshold)
    gone = [sum(each.is_gone for each in judge(predictor, corpus, mask.neurons)) for mask in (learned, union)]
    assert changes[0] < min(changes[1], 0.6)
    assert gone[0] >= max(gone[1], 2)
