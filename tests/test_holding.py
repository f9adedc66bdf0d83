"""Captions that are not gone are held harder: on the demo model, with all of them held too little at first."""

import math

import pytest
import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine import compensation
from nemo_prune.engine.attended import POINTS, attended_moments
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.completing import Copy, Limits
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import gather_corpus, judge
from nemo_prune.engine.holding import HARDER, hold_harder
from nemo_prune.engine.ordinary import mean_change, walk_ordinary
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.views import Seeds
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_pipeline
from nemo_prune.settings import LocalizationSettings

SETTINGS = LocalizationSettings(num_samples=4)
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
# What it prunes does hardly anything by itself.
NEURONS = (Neuron(MID, 0),)
ANY = Limits()


@pytest.fixture(scope="module")
def texts():
    memorized = [prompt.text for prompt in read_prompts(demo_folder() / PROMPTS_FILE)][:8]
    return memorized, [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)]


@pytest.fixture(scope="module")
def ground(texts):
    """What masks are judged against, and what attention takes: corpus, states, moments of ordinary and memorized."""
    pipe, (memorized, ordinary) = load_pipeline(demo_folder(), "cpu", torch.float32), texts
    predictor = NoisePredictor(pipe, SETTINGS)
    threshold = calibrate(Scorer(predictor), ordinary[:60]).threshold
    corpus = gather_corpus(predictor, memorized, ordinary[:8], Seeds.draw(predictor), threshold)
    states = walk_ordinary(predictor, ordinary[8:16], 4, 1)
    moments = attended_moments(predictor, ordinary[-32:]), attended_moments(predictor, memorized)
    return pipe, corpus, states, moments


@pytest.fixture
def predictor(ground, monkeypatch):
    monkeypatch.setattr(compensation, "GIVEN", 0.005)
    pipe, _, _, moments = ground
    return NoisePredictor(pipe, SETTINGS, compensation=Compensation(*moments))


def left_under(predictor, corpus):
    return tuple(each.prompt for each in judge(predictor, corpus, NEURONS) if not each.is_gone)


@pytest.mark.slow
def test_who_is_not_gone_is_held_harder_until_all_are_and_the_log_says_the_same_again(ground, predictor, tmp_path):
    _, corpus, states, _ = ground
    alike = predictor.compensation
    log = tmp_path / "held.jsonl"
    first, taken = hold_harder(predictor, corpus, states, NEURONS, ANY, log=LineLog(log))
    assert len(first.left) > len(taken.left) and set(first.weights.values()) == {1.0}
    assert left_under(predictor, corpus) == taken.not_gone
    assert first.change < taken.change == pytest.approx(mean_change(predictor, states, NEURONS))
    assert all(taken.weights[prompt] >= HARDER for prompt in first.left)
    # Who goes on judges nothing again, and ends with the same weights.
    again = NoisePredictor(predictor.pipe, SETTINGS, compensation=alike)
    assert hold_harder(again, corpus, states, NEURONS, ANY, log=LineLog(log)) == (first, taken)
    held = [weight for weight in taken.weights.values() if weight > 1]
    assert again.sample_passes == len(held) * POINTS < len(taken.weights) * POINTS
    mask = NeuronMask.from_neurons(NEURONS, predictor.sizes)
    assert again.in_weights(mask).digest == predictor.in_weights(mask).digest
    # So does who was stopped after the first round.
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    again.compensation = alike
    assert hold_harder(again, corpus, states, NEURONS, ANY, log=LineLog(log)) == (first, taken)


@pytest.mark.slow
def test_what_ordinary_captions_can_not_afford_is_not_done(ground, predictor):
    _, corpus, states, _ = ground
    alike, limit = predictor.compensation, mean_change(predictor, states, NEURONS) + 1e-4
    first, taken = hold_harder(predictor, corpus, states, NEURONS, Limits(limit, limit))
    assert first.left and taken is first
    assert predictor.compensation is alike


@pytest.mark.slow
def test_what_copies_and_what_it_copies_is_held_harder_although_it_is_gone(ground, predictor, monkeypatch):
    monkeypatch.setattr(compensation, "GIVEN", 0.1)
    _, corpus, states, _ = ground
    copying, source, *others = corpus.memorized.prompts
    seen = []

    def copies(mask, prompts=None):
        seen.append(predictor.compensation.hold)
        return [Copy(copying, source, 0.5), Copy("an ordinary caption", source, 1.0)] if len(seen) < 3 else []

    first, taken = hold_harder(predictor, corpus, states, NEURONS, ANY, copies)
    assert not first.not_gone and first.left == {copying, source}
    assert taken.weights == {copying: HARDER**2, source: HARDER**2} | dict.fromkeys(others, 1.0)
    assert seen[0] == 1 < seen[1] < seen[2] == predictor.compensation.hold and not taken.left


@pytest.mark.slow
def test_beyond_the_limit_is_held_what_really_copies_and_nothing_else(ground, predictor, monkeypatch):
    monkeypatch.setattr(compensation, "GIVEN", 0.1)
    _, corpus, states, _ = ground
    prompt, *_ = corpus.memorized.prompts
    limit = mean_change(predictor, states, NEURONS) + 1e-4

    def hold(*looks, most=math.inf):
        """With what each round's look sees, the last one ever again."""
        predictor.compensation = Compensation(*ground[3])
        seen = iter(looks)

        def copies(mask, prompts=None):
            return next(seen, looks[-1])

        return hold_harder(predictor, corpus, states, NEURONS, Limits(limit, most), copies)

    copy, close = [Copy(prompt, prompt, 0.5)], [Copy(prompt, prompt, 0.5, is_close=True)]
    first, taken = hold(close)
    assert taken is first and first.left == {prompt}
    first, taken = hold(copy, copy, close, [])
    # What only comes close costs no more than the limit: that nothing copies any longer is enough.
    assert taken.weights[prompt] == HARDER**2 and taken.change > limit and not taken.num_copies and taken.left
    assert predictor.compensation.hold > 1
    first, taken = hold(copy, copy, [], most=limit)
    assert taken is first and predictor.compensation.hold == 1
