"""Attribution, the search by gradient and the learned gates, on the demo model and on planted answers."""

import shutil
from dataclasses import astuple, replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine import pursuit, settling
from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.attribution import Attribution, benefits, costs
from nemo_prune.engine.budget import HELD_LESS, most_costly_first, thinned, utility_curve, within
from nemo_prune.engine.by_gradient import localize_by_gradient, search_ranked
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.completing import Copy, Limits, complete_for
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons, closed_gates
from nemo_prune.engine.gone import gather_corpus, judge
from nemo_prune.engine.learned import GateLearner, LearningSettings
from nemo_prune.engine.ordinary import change_by_timestep, mean_change, walk_ordinary
from nemo_prune.engine.pursuit import Pursuit, PursuitSettings, pursue
from nemo_prune.engine.reopening import ReopeningSettings
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.settling import Jury, rank_neurons, without_costly
from nemo_prune.engine.trials import drive
from nemo_prune.engine.views import Seeds
from nemo_prune.errors import SettingsError
from nemo_prune.files.work import WorkFiles
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_pipeline
from nemo_prune.settings import LocalizationSettings
from nemo_prune.stages.bar import Bar

TAU = 0.73
NEURONS = [Neuron("down", index) for index in range(8)]


@pytest.fixture
def tiny(pipe):
    return NoisePredictor(pipe, LocalizationSettings(num_samples=3))


@pytest.fixture(scope="module")
def demo():
    pipe = load_pipeline(demo_folder(), "cpu", torch.float32)
    return NoisePredictor(pipe, LocalizationSettings(num_samples=3))


@pytest.fixture(scope="module")
def captions():
    """Three memorized captions of the demo model and some ordinary ones."""
    memorized = [prompt.text for prompt in read_prompts(demo_folder() / PROMPTS_FILE)]
    return memorized[:3], [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)][:8]


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


def test_as_few_neurons_are_added_as_images_need_and_none_for_a_caption_that_copies_no_more(tiny):
    states, first, asked = walk_ordinary(tiny, ["e", "f"], 2, 7), all_neurons(tiny.sizes)[:2], []
    needed = {"a": 13, "b": 5, "an ordinary one": 17}

    def looks(mask, prompts=None):
        asked.append(tuple(prompts))
        return [Copy(prompt, "b", 1.0) for prompt in prompts if mask.num_neurons < needed[prompt]]

    copied = [Copy("a", "b", 1.0), Copy("b", "b", 1.0), Copy("an ordinary one", "a", 1.0)]
    found = complete_for(tiny, states, Seeds.draw(tiny), first, copied, looks)
    assert found[:2] == first and len(found) == len(set(found)) == 17
    assert asked.count(("b",)) == 1 and set(asked) == {(name,) for name in needed}


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


def test_an_unknown_search_is_refused():
    with pytest.raises(SettingsError, match="gradient or learned"):
        PursuitSettings(search="greedy")


def test_a_mask_under_which_nothing_copies_is_not_pursued(tiny):
    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)
    assert (
        pursue(tiny, ["a"], ["c", "d"], 0.5, PursuitSettings(), lambda mask, prompts=None: [], first=first).rounds == ()
    )
    assert tiny.sample_passes == 0


@pytest.mark.slow
def test_a_mask_that_leaves_copies_is_completed_and_given_up_for_one_that_leaves_none(tiny, monkeypatch):
    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)
    settings = PursuitSettings(
        search="gradient", more_seeds=2, watched=1, walked=1, points=2, rounds=1, probed=(), probe_seeds=2
    )
    looked_at = []

    def copies(mask, prompts=None):
        looked_at.append(mask)
        return [Copy("a", "a", 1.0)] if mask is first else []

    result = pursue(tiny, ["a"], ["c", "d"], 0.5, settings, copies, first=first)
    assert looked_at[0] is first and result.rounds[0].mask is first and len(result.rounds) == 2
    assert result.best is result.rounds[1] and not result.best.copies
    # It is completed first; only if that is not enough is another one searched.
    assert set(first.neurons) <= set(result.best.mask.neurons)
    searched = []
    monkeypatch.setattr(pursuit, "search_mask", lambda *given: searched.append(given) or all_neurons(tiny.sizes)[3:])
    result = pursue(
        tiny, ["a"], ["c", "d"], 0.5, replace(settings, rounds=2),
        lambda mask, prompts=None: [Copy("a", "a", 1.0)] if first.neurons[0] in mask.neurons else [], first=first,
    )  # fmt: skip
    # All others together do not help, so that none is added.
    assert len(result.rounds) == 2 and len(searched) == 1 and not result.best.copies
    assert result.rounds[0].mask is first


@pytest.mark.slow
def test_what_came_back_in_images_is_searched_again_more_strictly(tiny, monkeypatch):
    settings = PursuitSettings(
        search="gradient", more_seeds=2, watched=2, walked=1, points=2, rounds=1, probed=(761,), probe_seeds=2,
        reopening=ReopeningSettings(seeds=1, ordinary=8),
    )  # fmt: skip
    looked_at, searched, search = [], [], pursuit.search_mask

    def copies(mask, prompts=None):
        looked_at.append(mask)
        return [Copy("a", "b", 0.5)] if len(looked_at) == 1 else []

    monkeypatch.setattr(
        pursuit,
        "search_mask",
        lambda predictor, corpus, *given: searched.append(corpus) or search(predictor, corpus, *given),
    )
    result = pursue(tiny, ["a", "b", "c"], ["d", "e", "f"], 0.5, settings, copies)
    assert len(result.rounds) == 2 and result.best is result.rounds[1]
    assert result.rounds[0].copies and not result.rounds[1].copies
    # The caption and the one whose picture it copied; on more seeds.
    assert [each.strictness.tolist() for each in searched] == [[0, 0, 0], pytest.approx([0.1, 0.1, 0])]
    assert [len(each.seeds) for each in searched] == [5, 7]


@pytest.mark.slow
def test_a_mask_is_completed_as_long_as_other_captions_come_back(tiny):
    """One caption copies, then another one, then none."""
    settings = PursuitSettings(more_seeds=2, watched=1, walked=1, points=2, probed=(), probe_seeds=2)

    def copies(mask, prompts=None):
        copying = {"a": mask.num_neurons < 5, "b": 5 <= mask.num_neurons < 9}
        return [Copy(text, text, 1.0) for text in prompts or copying if copying[text]]

    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)
    result = pursue(tiny, ["a", "b"], ["c", "d"], 0.5, settings, copies, first=first)
    assert [each.mask.num_neurons for each in result.rounds] == [1, 5, 9] and result.best is result.rounds[2]
    assert set(result.rounds[1].mask.neurons) < set(result.best.mask.neurons)


def test_a_mask_is_completed_no_further_than_ordinary_captions_afford_it(tiny, monkeypatch):
    settings = PursuitSettings(more_seeds=2, watched=1, walked=1, points=2)
    monkeypatch.setattr(pursuit, "search_mask", lambda *given: pytest.fail("another mask was searched"))

    def copies(mask, prompts=None):
        copying = {"a": mask.num_neurons < 5, "b": True}
        return [Copy(text, text, 1.0) for text in prompts or copying if copying[text]]

    def pursued(max_change):
        asked = replace(settings, limits=Limits(max_change, max_change))
        return pursue(tiny, ["a", "b"], ["c", "d"], 0.5, asked, copies, first=first)

    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)
    result = pursued(1e-6)
    assert [each.mask.num_neurons for each in result.rounds] == [1] and result.best.mask is first
    change = result.best.change
    # The next round changes more: what it would cost is said, and the one before is taken.
    result = pursued(change + 1e-6)
    assert [each.mask.num_neurons for each in result.rounds] == [1, 5] and result.best.mask is first
    assert result.next_step_costs == pytest.approx(result.rounds[1].change - change) and result.next_step_costs > 1e-6


def test_a_mask_is_completed_for_what_comes_close_only_as_far_as_that_is_afforded(tiny, monkeypatch):
    settings = PursuitSettings(more_seeds=2, watched=1, walked=1, points=2)

    def copies(mask, prompts=None):
        """One caption copies, another one comes close, which takes as many neurons again."""
        left = {"a": mask.num_neurons < 5, "b": mask.num_neurons < 9}
        return [Copy(text, text, 1.0, is_close=text == "b") for text in prompts or left if left[text]]

    def pursued(afforded):
        asked = replace(settings, limits=Limits(afforded))
        return pursue(tiny, ["a", "b"], ["c", "d"], 0.5, asked, copies, first=first)

    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)
    result = pursued(1e-6)
    assert [each.mask.num_neurons for each in result.rounds] == [1, 5] and result.best is result.rounds[1]
    assert result.best.copies and not result.best.real_copies
    result = pursued(1.0)
    assert [each.mask.num_neurons for each in result.rounds] == [1, 9] and not result.best.copies
    # What cost more than is afforded is not the best for that alone.
    assert Pursuit(result.rounds[::-1]).best is result.rounds[1]
    close = replace(result.rounds[0], copies=(Copy("b", "b", 1.0, is_close=True),))
    assert Pursuit((close, result.rounds[1])).best is result.rounds[1]
    assert Pursuit((close, result.rounds[1]), Limits(close.change + 1e-6)).best is close


def test_rounds_that_ended_before_a_stop_are_not_made_again(tiny, tmp_path):
    settings, work, asked = PursuitSettings(more_seeds=2, watched=1, walked=1, points=2), WorkFiles(tmp_path), []
    first = NeuronMask.from_neurons(all_neurons(tiny.sizes)[:1], tiny.sizes)

    def copies(mask, prompts=None):
        asked.append(prompts)
        copying = {"a": mask.num_neurons < 5, "b": 5 <= mask.num_neurons < 9}
        return [Copy(text, text, 1.0) for text in prompts or copying if copying[text]]

    def pursued():
        return pursue(tiny, ["a", "b"], ["c", "d"], 0.5, settings, copies, first=first, work=work)

    def facts(found):
        return [(each.mask.neurons, each.change, each.copies, each.sample_passes) for each in found.rounds]

    whole = facts(pursued())
    passes, _ = tiny.sample_passes, asked.clear()
    assert facts(pursued()) == whole and tiny.sample_passes == passes and asked == [None]
    file = work.rounds
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(whole) == 4
    file.write_text("".join(lines[:-1]))
    assert [neurons for neurons, *_ in facts(pursued())] == [neurons for neurons, *_ in whole]
    assert file.read_text().startswith("".join(lines[:-1])) and tiny.sample_passes > passes


@pytest.mark.slow
def test_a_learned_search_goes_on_where_it_stopped(demo, captions, tmp_path):
    """One caption comes back in images once, so that a second search is made, more strictly."""
    settings = PursuitSettings(
        learning=LearningSettings(steps=3, captions=2, seeds=2, ordinary=2, start=0.2),
        reopening=ReopeningSettings(seeds=1, ordinary=4), tries=6, more_seeds=2, watched=2, walked=1, points=2,
        rounds=1, probed=(761,), probe_seeds=2,
    )  # fmt: skip

    (first, second, _), ordinary = captions

    def pursued(folder):
        looked_at = []

        def copies(mask, prompts=None):
            looked_at.append(mask)
            return [Copy(first, first, 0.5)] if len(looked_at) == 1 else []

        found = pursue(demo, [first, second], ordinary, TAU, settings, copies, work=WorkFiles(folder))
        return [each.mask.neurons for each in found.rounds]

    whole, kept = pursued(tmp_path / "whole"), {}
    passes = demo.sample_passes
    assert pursued(tmp_path / "whole") == whole and len(whole) == 2
    # Of the rounds alone the change on ordinary captions is looked at again.
    states = settings.walked * settings.points
    assert demo.sample_passes - passes == 2 * states + 2 * states
    for file in sorted((tmp_path / "whole" / "searches").glob("*/*ed.jsonl")):
        kept[file.name] = kept.get(file.name, 0) + len(file.read_text().splitlines())
        stopped = tmp_path / f"{file.parent.name} {file.name}"
        shutil.copytree(tmp_path / "whole", stopped)
        there = stopped / "searches" / file.parent.name
        lines = file.read_text().splitlines(keepends=True)
        (there / file.name).write_text("".join(lines[: len(lines) // 2]))
        if file.name == "completed.jsonl":
            (there / "reopened.jsonl").unlink()
        assert pursued(stopped) == whole
        assert (there / file.name).read_text() == file.read_text()
    assert kept.keys() == {"completed.jsonl", "judged.jsonl", "reopened.jsonl"} and min(kept.values()) > 2


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
