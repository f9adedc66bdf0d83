"""A mask is completed, or searched again, for what copies in images: rounds, limits, and going on after a stop."""

import shutil
from dataclasses import replace

import pytest

from nemo_prune.engine import pursuit
from nemo_prune.engine.completing import Copy, Limits, complete_for
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.learned import LearningSettings
from nemo_prune.engine.ordinary import walk_ordinary
from nemo_prune.engine.pursuit import Pursuit, PursuitSettings, pursue
from nemo_prune.engine.reopening import ReopeningSettings
from nemo_prune.engine.views import Seeds
from nemo_prune.errors import SettingsError
from nemo_prune.files.work import WorkFiles
from nemo_prune.mask import NeuronMask

TAU = 0.73


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
