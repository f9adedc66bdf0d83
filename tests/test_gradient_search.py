"""Attribution, the search by gradient and the learned gates, on the demo model and on planted answers."""

from dataclasses import astuple, replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from nemo_prune.engine import settling
from nemo_prune.engine.attribution import Attribution, benefits, costs
from nemo_prune.engine.by_gradient import localize_by_gradient, search_ranked
from nemo_prune.engine.gates import all_neurons, closed_gates
from nemo_prune.engine.gone import gather_corpus, judge
from nemo_prune.engine.learned import GateLearner, LearningSettings
from nemo_prune.engine.ordinary import change_by_timestep, mean_change, walk_ordinary
from nemo_prune.engine.pursuit import PursuitSettings, pursue
from nemo_prune.engine.reopening import ReopeningSettings
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.settling import Jury, rank_neurons, without_costly
from nemo_prune.engine.trials import drive
from nemo_prune.engine.views import Seeds
from nemo_prune.mask import Neuron

TAU = 0.73
NEURONS = [Neuron("down", index) for index in range(8)]


@pytest.mark.slow
def test_the_shares_of_a_change_add_up_to_it(tiny):
    states = walk_ordinary(tiny, ["a cat", "a dog"], 3, 7)
    assert len(states) == 6
    cost = costs(tiny, states, range(6), points=16)
    assert float(cost.values.sum()) == pytest.approx(cost.total, rel=0.3)
    # Everything suppressed changes all of it, but for captions that differ.
    assert cost.total == pytest.approx(1, abs=0.2)
    assert (cost.values >= 0).all()


def test_neurons_that_act_all_the_way_have_no_share(tiny):
    states = walk_ordinary(tiny, ["a cat", "a dog"], 3, 7)
    closed = all_neurons(tiny.sizes)[:5]
    cost = costs(tiny, states, range(6), held_open=closed_gates(closed, tiny.sizes))
    assert (cost.values[5:] == 0).all() and (cost.values[:5] > 0).any()


def test_changes_are_shares_of_what_everything_suppressed_changes(tiny):
    states = walk_ordinary(tiny, ["a cat", "a dog"], 3, 7)
    everything = change_by_timestep(tiny, states, torch.zeros(sum(tiny.sizes.values())))
    assert all(0.7 <= value <= 1.001 for value in everything.values())
    assert mean_change(tiny, states, ()) == pytest.approx(0, abs=1e-4)


def test_ranks_prefer_what_does_more_for_less():
    ranks = rank_neurons(torch.tensor([0.4, 0.4, 0.1, -0.2]), torch.tensor([0.1, 0.9, 0.1, 0.1]))
    assert ranks.argsort(descending=True).tolist() == [0, 2, 1, 3]


def test_of_a_ranking_what_can_be_spared_is_spared_the_last_first():
    """Any two of 1, 3 and 6 are enough: 6 stands last and is spared."""
    culprits = {NEURONS[1], NEURONS[3], NEURONS[6]}
    found = drive(
        search_ranked(NEURONS, [0, 1], 0.4),
        lambda trials: [0.1 if len(trial.neurons & culprits) >= 2 else 0.9 for trial in trials],
    )
    assert found.resolved and set(found.neurons) == {NEURONS[1], NEURONS[3]}


def test_a_ranking_that_is_not_enough_stays_unresolved():
    found = drive(search_ranked(NEURONS, [0, 1], 0.4), lambda trials: [0.8] * len(trials))
    assert not found.resolved


def test_a_fall_in_similarity_to_another_caption_is_divided_too(tiny):
    memorized = gather_corpus(tiny, ["a", "b"], ["c", "d"], Seeds.draw(tiny), 0.5).memorized
    own, same, other = (benefits(tiny, memorized, 0, resembled=which) for which in (None, 0, 1))
    assert torch.equal(own.values, same.values) and not torch.equal(own.values, other.values)
    # Without suppression it is like itself alone, so that there is more to fall.
    assert own.total > other.total


def test_the_most_costly_are_spared_as_far_as_the_others_are_enough(tiny):
    neurons, cost = all_neurons(tiny.sizes)[:8], torch.zeros(sum(tiny.sizes.values()))
    cost[:8] = torch.tensor([1.0, 8.0, 3.0, 2.0, 7.0, 6.0, 5.0, 4.0])
    needed, asked = {neurons[2], neurons[5]}, []

    def hold(left):
        asked.append(left)
        return needed <= set(left)

    assert without_costly(neurons, cost, tiny, hold) == [neurons[2], neurons[5]] and len(asked) <= len(neurons) + 2
    # Where any three do, the three cheapest stay, in their order.
    assert without_costly(neurons, cost, tiny, lambda left: len(left) >= 3) == [neurons[i] for i in (0, 2, 3)]
    assert without_costly(neurons[:1], cost, tiny, hold) == neurons[:1]


@pytest.mark.parametrize(("resemblance", "added"), [(-0.2, 6), (0.1, 2)])
def test_neurons_are_added_against_what_keeps_a_caption_from_being_gone(tiny, monkeypatch, resemblance, added):
    """Neuron 2 makes the caption like itself, neuron 6 like the other one."""
    corpus = gather_corpus(tiny, ["a", "b"], ["c", "d"], Seeds.draw(tiny), 0.5)
    neurons, jury = all_neurons(tiny.sizes), Jury(tiny, corpus)
    found = judge(tiny, corpus, ())[0]
    blocked = replace(found, nearest="b", similarity_margin=-0.1, resemblance_margin=resemblance, agreement_margin=0.3)
    monkeypatch.setattr(jury, "judge_one", lambda position, neurons: blocked)
    monkeypatch.setattr(jury, "is_gone", lambda position, closed, margin=0.0: position == 1 or neurons[added] in closed)

    def planted(predictor, memorized, position, closed, resembled):
        values = torch.zeros(len(neurons))
        values[2 if resembled == position else 6] = 1.0
        return Attribution(values, 1.0)

    monkeypatch.setattr(settling, "benefits", planted)
    assert settling.complete(tiny, jury, walk_ordinary(tiny, ["e"], 2, 7), ()) == [neurons[added]]


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["projected", "hard-concrete"])
def test_learning_depends_on_its_seed_alone_and_goes_on_where_it_stopped(tiny, tmp_path, gates):
    corpus = gather_corpus(tiny, ["a", "b"], ["c", "d"], Seeds.draw(tiny), 0.5)
    states = walk_ordinary(tiny, ["e", "f"], 2, 7)
    settings = LearningSettings(gates=gates, captions=2, seeds=2, ordinary=2)

    def learn(steps, settings=settings, file=None):
        learner = GateLearner(tiny, corpus, states, settings)
        if file is not None:
            learner.resume(file)
        while learner.step < steps:
            learner.take_step()
        return learner

    whole, half = learn(4), learn(2)
    half.save(tmp_path / "learning.pt")
    assert torch.equal(learn(4, file=tmp_path / "learning.pt").values, whole.values)
    other = replace(settings, seed=1)
    assert not torch.equal(learn(4, other).values, whole.values)
    # What began with other settings is not gone on with.
    assert torch.equal(learn(4, other, tmp_path / "learning.pt").values, learn(4, other).values)


def test_where_memory_is_short_a_step_sees_fewer_captions_at_once_and_learns_the_same(tiny, monkeypatch):
    corpus = gather_corpus(tiny, ["a", "b"], ["c", "d"], Seeds.draw(tiny), 0.5)
    states = walk_ordinary(tiny, ["e", "f"], 2, 7)
    settings = LearningSettings(captions=2, seeds=2, ordinary=4)
    forward, batches = UNet2DConditionModel.forward, []

    def short(unet, sample, *arguments, **named):
        batches.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(unet, sample, *arguments, **named)

    whole, parts = (GateLearner(tiny, corpus, states, settings) for _ in range(2))
    expected = [whole.take_step() for _ in range(2)]
    monkeypatch.setattr(UNet2DConditionModel, "forward", short)
    found = [parts.take_step() for _ in range(2)]
    # The first step tries all four samples at once; afterwards no more than fit are tried.
    assert batches == [4, 2, 2, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-3, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert astuple(one) == pytest.approx(astuple(other), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_neurons_that_do_most_silence_a_caption_and_as_many_others_do_not(demo, captions):
    memorized, ordinary = captions
    corpus = gather_corpus(demo, memorized, ordinary, Seeds.draw(demo), TAU)
    benefit = benefits(demo, corpus.memorized, 0)
    assert float(benefit.values.sum()) == pytest.approx(benefit.total, abs=0.3)
    order = benefit.values.argsort(descending=True).tolist()
    neurons = all_neurons(demo.sizes)
    best, worst = [neurons[i] for i in order[:10]], [neurons[i] for i in order[-10:]]
    assert judge(demo, corpus, best)[0].is_silent
    assert not judge(demo, corpus, worst)[0].is_silent


@pytest.mark.slow
def test_gates_opened_from_everything_on_leave_few_neurons_under_which_a_caption_is_gone(demo, captions):
    memorized, ordinary = captions
    settings = PursuitSettings(
        search="gradient", more_seeds=2, watched=4, walked=4, points=3, reopening=ReopeningSettings(seeds=1, ordinary=8)
    )
    result = pursue(demo, memorized[:1], ordinary, TAU, settings)
    (only,) = result.rounds
    assert not only.not_gone and not only.called_up
    assert 0 < only.mask.num_neurons < 40
    assert only.change < 0.3


@pytest.mark.slow
def test_a_corpus_by_gradient_takes_memorized_captions_and_says_of_others_that_they_are_not(demo, captions):
    memorized, ordinary = captions
    scorer = Scorer(demo)
    texts, cost = [ordinary[0], *memorized[:2]], torch.ones(sum(demo.sizes.values()))
    highest = scorer.score_prompts(ordinary[:1])[0].memorization.values.max()
    tau = max(TAU, float(highest) + 0.01)
    found = list(localize_by_gradient(scorer, texts, tau, cost))
    assert [each.prompt for each in found] == texts
    assert [each.status for each in found] == ["not_memorized", "localized", "localized"]
    suppressed = {neuron for each in found for neuron in each.neurons}
    for text, each in zip(texts[1:], found[1:], strict=True):
        (scored,) = scorer.score_prompts([text])
        assert max(scorer.suppressed_similarities(scored, each.kept_seeds, suppressed)) <= tau
