"""Harder ground than the demo: its reference, which was trained without the terms that make it localizable."""

import pytest
import torch

from benchmarks.merging import REFERENCE_MODEL
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import FRESH_SEED, gather_corpus, judge
from nemo_prune.engine.learned import LearningSettings
from nemo_prune.engine.ordinary import mean_change, walk_ordinary
from nemo_prune.engine.pursuit import PursuitSettings, pursue
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.views import Seeds
from nemo_prune.mask import NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.cost import matched_random_mask
from nemo_prune.settings import LocalizationSettings


@pytest.mark.slow
def test_learned_gates_make_captions_go_and_as_many_random_neurons_do_not():
    predictor = NoisePredictor(load_pipeline(REFERENCE_MODEL, "cpu", torch.float32), LocalizationSettings())
    prompts = [prompt.text for prompt in read_prompts(REFERENCE_MODEL / PROMPTS_FILE)][:2]
    usual, test = ([p.text for p in read_prompts(REFERENCE_MODEL / name)] for name in (CALIBRATION_FILE, TEST_FILE))
    calibration = calibrate(Scorer(predictor), usual[:50])
    learning = LearningSettings(steps=50, captions=2, seeds=3, ordinary=6)
    settings = PursuitSettings(learning=learning, more_seeds=2, watched=8, walked=12, points=3, tries=8)
    learned = pursue(predictor, prompts, usual, calibration.threshold, settings).best.mask
    random = matched_random_mask(learned, calibration.statistics.mean, seed=0)
    # Seeds and captions that no search has seen.
    states = walk_ordinary(predictor, test[:8], 4, FRESH_SEED)
    corpus = gather_corpus(predictor, prompts, test[8:16], Seeds.draw(predictor, FRESH_SEED, 5), calibration.threshold)

    def gone(mask: NeuronMask) -> int:
        return sum(each.is_gone for each in judge(predictor, corpus, mask.neurons))

    assert gone(learned) == len(prompts) and gone(random) == 0
    # Everything suppressed is 1, the paper's union for all captions .89.
    assert mean_change(predictor, states, learned.neurons) < 0.6
