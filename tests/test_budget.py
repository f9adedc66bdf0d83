"""What ordinary captions may lose: masks thinned for a limit, and the curve of what that gives up."""

from dataclasses import replace

import pytest

from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.budget import HELD_LESS, most_costly_first, thinned, utility_curve, within
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import gather_corpus
from nemo_prune.engine.ordinary import mean_change, walk_ordinary
from nemo_prune.engine.views import Seeds
from nemo_prune.files.work import WorkFiles
from nemo_prune.mask import Neuron
from nemo_prune.stages.bar import Bar

TAU = 0.73


@pytest.mark.slow
def test_a_smaller_budget_gives_captions_up(demo, captions):
    memorized, ordinary = captions
    corpus = gather_corpus(demo, memorized, ordinary, Seeds.draw(demo), TAU)
    states = walk_ordinary(demo, ordinary, 3, 7)
    curve = utility_curve(demo, corpus, states, all_neurons(demo.sizes), points=4)
    assert curve[0].change == pytest.approx(1, abs=0.1) and len(curve[0].gone) == 3
    assert curve[-1].neurons == () and curve[-1].change == pytest.approx(0, abs=1e-3)
    assert set(curve[-1].given_up) == set(memorized)
    changes = [point.change for point in curve]
    assert changes == sorted(changes, reverse=True)
    assert within(curve, 1.1).given_up == () and within(curve, 0.0) is curve[-1]


def test_the_fewest_of_the_most_costly_neurons_act_again_that_a_limit_asks_for(tiny, tmp_path):
    ordinary = ["a cat", "a dog", "a red house"]
    usual, theirs = (attended_moments(tiny, texts) for texts in (ordinary, ["one", "two"]))
    released = NoisePredictor(tiny.pipe, tiny.settings, compensation=Compensation(usual, theirs))
    states, everything = walk_ordinary(released, ordinary, 3, 7), all_neurons(tiny.sizes)
    order = most_costly_first(released, states, everything)
    kept = thinned(released, states, everything, 0.5)
    assert kept == order[len(order) - len(kept) :] and 1 < len(kept) < len(order)
    assert mean_change(released, states, kept) <= 0.5 < mean_change(released, states, order[-len(kept) - 1 :])
    assert thinned(released, states, everything, 2.0) == everything
    assert len(thinned(released, states, everything, 0.0)) == 1
    assert thinned(released, states, everything[:1], 0.0) == everything[:1]
    # In a run it is kept, for this mask and limit.
    bar = Bar(None, released, ["one", "two"], ordinary, WorkFiles(tmp_path))
    found, passes = bar.thinned(everything, 0.5), released.sample_passes
    again = Bar(None, released, ["one", "two"], ordinary, WorkFiles(tmp_path))
    assert again.thinned(everything, 0.5) == found and released.sample_passes == passes
    assert len(again.thinned(everything, 0.0)) == 1 and released.sample_passes > passes


@pytest.mark.slow
def test_where_no_part_of_a_mask_is_within_a_limit_captions_are_held_less(demo, captions):
    memorized, ordinary = captions
    usual, theirs = (attended_moments(demo, texts) for texts in (ordinary, memorized))
    released = NoisePredictor(demo.pipe, demo.settings, compensation=Compensation(usual, theirs))
    corpus = gather_corpus(demo, memorized, ordinary, Seeds.draw(demo), TAU)
    states = walk_ordinary(demo, ordinary, 3, 7)
    neurons = [Neuron("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", index) for index in range(4)]
    whole = utility_curve(released, corpus, states, neurons)
    least = min(point.change for point in whole[:-1])
    assert {point.hold for point in whole} == {1.0} and len(whole[-1].neurons) == 0 < least
    held = released.compensation
    curve = utility_curve(released, corpus, states, neurons, limit=0.9 * least)
    assert [point.hold for point in curve] == [1.0] * (len(whole) - 1) + list(HELD_LESS) + [1.0]
    assert [point.change for point in curve[-6:]] == sorted((point.change for point in curve[-6:]), reverse=True)
    assert released.compensation is held
    taken = within(curve, 0.9 * least)
    assert taken.hold < 1 and len(taken.neurons) == 2 and taken.change <= 0.9 * least
    released.compensation = replace(held, hold=taken.hold)
    assert mean_change(released, states, taken.neurons) == pytest.approx(taken.change)
