"""Evidence on a tiny pipeline: gathered within a budget, resumed, told in a report that a browser opens."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

from browser import NoBrowser, browser, find_browser
from nemo_prune.corpus.prompts import Prompt
from nemo_prune.errors import PromptError, SettingsError
from nemo_prune.files.json_values import to_json
from nemo_prune.progress import Listener
from nemo_prune.proof.attack import AttackSettings
from nemo_prune.proof.drawing import Drawing, draw
from nemo_prune.proof.evidence import PARTS, Evidence, EvidenceSettings, published_facts
from nemo_prune.proof.regrowth import FineTuning
from nemo_prune.release.evidence_report import PromptNeurons, ReportContext, write_evidence_report
from nemo_prune.release.evidence_wording import broken_limits, verdict
from nemo_prune.release.wording import evidence_notes, evidence_rows
from nemo_prune.stages.verify import gather_evidence
from test_copies import picture
from test_proofs import ORDINARY, pruned, same, weights

HOSTILE = "<script>document.title = 'out'</script> \"dog\" & {{ 7 * 7 }} zanzibar"
SETTINGS = EvidenceSettings(
    budget=900,
    drawing=Drawing("ddim", 2, 3.0),
    quick_steps=2,
    most_rounds=2,
    utility_captions=3,
    attack=AttackSettings(steps=4, batch_size=2, looks=(0, 2, 4), images_per_look=1, drawing_steps=1),
    fine_tuning=FineTuning(steps=(1, 2), batch_size=2, images=2),
)


class Recorded(Listener):
    """Notes the stages, and stops one if it is told to."""

    def __init__(self, stop_at=None, after=1):
        self.stages, self._stop_at, self._after = {}, stop_at, after

    @contextmanager
    def stage(self, stage):
        def advance(done, total):
            self.stages[stage.key] = (done, total)
            if stage.key == self._stop_at and done >= self._after:
                raise KeyboardInterrupt

        self.stages[stage.key] = None
        yield advance


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    picture(1).save(folder / "cat.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    return [
        Prompt("a cat zanzibar", "VM", folder / "cat.png"),
        Prompt(HOSTILE, "TM"),
        Prompt("two ships zanzibar", "VM", folder / "black.png"),
    ]


@pytest.fixture(scope="module")
def candidate(pipe, tmp_path_factory):
    return pruned(pipe, tmp_path_factory.mktemp("candidate"))


@pytest.fixture(scope="module")
def gathered(pipe, candidate, prompts, tmp_path_factory):
    """The evidence, its folder and what a listener heard."""
    folder, heard = tmp_path_factory.mktemp("evidence") / "work", Recorded()
    before = weights(pipe), weights(candidate[0])
    neurons = {"a cat zanzibar": list(candidate[1])}
    evidence = gather_evidence(pipe, candidate[0], prompts, ORDINARY, SETTINGS, folder, heard, neurons=neurons)
    assert same(before[0], pipe.unet.state_dict()) and same(before[1], candidate[0].unet.state_dict())
    return evidence, folder, heard


def without_times(evidence):
    return replace(evidence, summary=replace(evidence.summary, seconds={}))


@pytest.mark.slow
def test_every_part_is_measured_or_said_to_be_left_out(gathered):
    evidence, folder, heard = gathered
    summary = evidence.summary
    assert set(summary.passes) | set(summary.left_out) >= set(PARTS)
    # One caption alone has a training image and neurons: a matrix needs two.
    assert set(summary.left_out) == {"recall"}
    assert sum(summary.passes.values()) <= summary.budget and summary.passes["attack"] > 0
    assert set(heard.stages) == set(PARTS)
    assert {(each.model, each.memorized) for each in summary.attacks} >= {("candidate", True), ("candidate", False)}
    assert summary.changes.rows and not summary.changes.others and summary.roots.found == 3
    assert [each.treatment for each in summary.regrown][-2:] == ["1 steps of fine-tuning", "2 steps of fine-tuning"]
    assert len(summary.variants) == 13 and summary.tokens and set(summary.membership) == {"base", "candidate"}
    assert Evidence.from_json(json.loads((folder / "evidence.json").read_text())) == evidence


@pytest.mark.slow
def test_a_placeholder_counts_as_not_available_and_the_base_stands_in(gathered):
    evidence, _, _ = gathered
    assert list(evidence.not_available) == ["two ships zanzibar"]
    references = {each.prompt: each.reference for each in evidence.captions}
    assert references == {
        "a cat zanzibar": "training image", HOSTILE: "the base's own seeds",
        "two ships zanzibar": "the base's own seeds",
    }  # fmt: skip
    assert evidence.summary.replication.everything.by_training_image == 1
    assert evidence.summary.replication.not_available == 1
    assert "the base's own images of other seeds stand in" in verdict(evidence.summary)


@pytest.mark.slow
def test_what_can_be_published_holds_no_caption_and_no_path(gathered):
    evidence, folder, _ = gathered
    published = json.dumps(Evidence.to_json(evidence)["summary"]) + str(
        evidence_rows(published_facts(evidence.summary))
    )
    assert "zanzibar" not in published and str(folder.parent) not in published


@pytest.mark.slow
def test_published_facts_are_coarse_and_have_no_figure_of_few_captions(gathered):
    summary = gathered[0].summary
    facts = published_facts(summary)
    assert set(facts.replication) == {"all"} and set(summary.replication.by_kind) == {"VM", "TM"}
    assert len(facts.attacks) == len(summary.attacks) and "curve" not in str(to_json(facts))
    numbers = re.findall(r"-?\d+\.\d+", json.dumps(to_json(facts)))
    assert numbers and all(round(float(number), 3) == float(number) for number in numbers)
    assert facts.utility.held_out["candidate"] == round(summary.utility_loss, 3)
    assert evidence_rows(facts)[0][0] == "images of 3 memorized captions that are copies"
    assert any("For 2 of 3 captions no training image is known" in note for note in evidence_notes(facts))
    assert any("Left out: recall" in note for note in evidence_notes(facts))


@pytest.mark.slow
def test_images_drawn_elsewhere_cost_nothing_and_what_costs_most_can_be_left_out(pipe, candidate, prompts, tmp_path):
    settings = replace(SETTINGS, thorough=False, most_rounds=1, parts=("replication", "utility", "attack"))
    seeds = [settings.seed, settings.seed + 1]
    drawn = {
        name: {text: draw(model, text, settings.drawing, seeds) for text in [each.text for each in prompts] + ORDINARY}
        for name, model in (("base", pipe), ("candidate", candidate[0]))
    }
    whole = gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "whole").summary
    lent = gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "lent", drawn=drawn).summary
    assert whole.passes["replication"] > 0 == lent.passes["replication"]
    assert lent.replication == whole.replication and lent.replication.everything.captions == 3
    assert lent.attacks and all(each.memorized for each in lent.attacks)
    assert lent.utility.images_random is None and lent.replication.everything.base.parts is None


@pytest.mark.slow
def test_a_model_beside_itself_gives_back_the_same_and_has_lost_nothing(pipe, prompts, tmp_path):
    settings = replace(SETTINGS, parts=("replication", "utility", "roots"))
    summary = gather_evidence(pipe, pipe, prompts, ORDINARY, settings, tmp_path / "work").summary
    assert summary.utility_loss == 0 and summary.utility.equivalence.holds
    everything = summary.replication.everything
    assert everything.base == everything.candidate and everything.candidate.to_base.median > 0.999
    assert not summary.changes.rows and summary.roots.zeroed == 0 and not summary.refilled
    assert set(summary.left_out) == set(PARTS) - {"replication", "utility", "roots"}
    assert broken_limits(summary, max_replication=1.0, max_utility_loss=0.0) == []


@pytest.mark.slow
def test_everything_is_resumed_and_nothing_is_measured_twice(gathered, pipe, candidate, prompts):
    evidence, folder, _ = gathered
    passes = []

    def hook(module, inputs, output):
        # Looking for the text projections takes a dry pass at timestep 0.
        if not isinstance(inputs[1], int):
            passes.append(inputs)

    handle = pipe.unet.register_forward_hook(hook)
    try:
        again = gather_evidence(
            pipe, candidate[0], prompts, ORDINARY, SETTINGS, folder, neurons={"a cat zanzibar": list(candidate[1])}
        )
    finally:
        handle.remove()
    assert without_times(again) == without_times(evidence) and not passes


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "after"), [("replication", 2), ("attack", 1)])
def test_a_stopped_gathering_ends_as_if_it_had_not_been_stopped(
    gathered, pipe, candidate, prompts, tmp_path, stage, after
):
    evidence, _, _ = gathered
    arguments = (pipe, candidate[0], prompts, ORDINARY, SETTINGS, tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        gather_evidence(*arguments, Recorded(stage, after), neurons={"a cat zanzibar": list(candidate[1])})
    resumed = gather_evidence(*arguments, neurons={"a cat zanzibar": list(candidate[1])})
    assert without_times(resumed) == without_times(evidence)


@pytest.mark.slow
def test_other_weights_begin_anew_and_a_larger_budget_goes_on(gathered, pipe, candidate, prompts, tmp_path):
    evidence, folder, _ = gathered
    shutil.copytree(folder, tmp_path / "work")
    settings = replace(SETTINGS, budget=2 * SETTINGS.budget, parts=("replication", "attack"))
    lines = (tmp_path / "work" / "attack.jsonl").read_text().splitlines()
    gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "work")
    more = (tmp_path / "work" / "attack.jsonl").read_text().splitlines()
    assert more[: len(lines)] == lines and len(more) > len(lines)
    assert evidence.summary.passes["attack"] > 0
    gather_evidence(pipe, pipe, prompts, ORDINARY, replace(settings, parts=("replication",)), tmp_path / "work")
    assert (tmp_path / "work" / "replication.jsonl").read_text().splitlines()[0] != lines[0]


@pytest.mark.slow
def test_a_small_budget_leaves_parts_out_by_name(pipe, candidate, prompts, tmp_path):
    settings = replace(SETTINGS, budget=120, parts=("replication", "attack"), attack=AttackSettings())
    summary = gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "work").summary
    assert "budget" in summary.left_out["attack"]
    assert "was not measured" in verdict(summary)
    assert 1 <= summary.replication.everything.captions <= 3


@pytest.mark.slow
def test_minutes_become_passes_by_the_speed_that_is_measured(pipe, candidate, prompts, tmp_path):
    settings = replace(SETTINGS, minutes=0.01, parts=("replication",))
    budget = gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "work").summary.budget
    settings = replace(settings, minutes=0.02)
    twice = gather_evidence(pipe, candidate[0], prompts, ORDINARY, settings, tmp_path / "work").summary.budget
    assert budget > 0 and abs(twice - 2 * budget) <= 1


def test_what_makes_no_sense_is_refused_by_name(pipe, candidate, prompts, tmp_path):
    with pytest.raises(SettingsError, match="no part `everything`"):
        EvidenceSettings(parts=("everything",))
    with pytest.raises(SettingsError, match="budget must be above 0"):
        EvidenceSettings(budget=0)
    with pytest.raises(PromptError, match="ordinary ones"):
        gather_evidence(pipe, candidate[0], prompts, [], SETTINGS, tmp_path)


@pytest.mark.slow
def test_limits_are_broken_above_them_and_by_what_was_not_measured(gathered):
    summary = gathered[0].summary
    loss = summary.utility_loss
    assert broken_limits(summary, None, None) == []
    assert broken_limits(summary, 1.0, loss) == []
    (sentence,) = broken_limits(summary, None, loss / 2)
    assert "utility loss" in sentence and f"{loss:.3f}" in sentence
    assert "not measured" in broken_limits(replace(summary, utility=None), None, 1.0)[0]


# --- the report ---


@pytest.fixture(scope="module")
def report(gathered, prompts, candidate, tmp_path_factory):
    evidence, folder, _ = gathered
    layers = {}
    for name, index in candidate[1]:
        layers.setdefault(name, []).append(index)
    known = [
        PromptNeurons("a cat zanzibar", "VM", "localized", layers, 0.9, 0.3),
        PromptNeurons(HOSTILE, "TM", "unresolved", {}, 0.8, 0.7),
        PromptNeurons("two ships zanzibar", None, "not_memorized", {}),
    ]
    context = ReportContext(
        training_images={"a cat zanzibar": picture(1)},
        layer_sizes=dict.fromkeys(layers, 8),
        prompts=known,
        threshold=0.5,
        versions={"torch": torch.__version__},
        max_utility_loss=0.0,
    )
    # In a folder of its own: nothing else can be beside it.
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_evidence_report(path, evidence, folder / "images", context)


def test_the_report_is_one_file_with_captions_escaped_and_alt_texts(report):
    text = report.read_text(encoding="utf-8")
    assert HOSTILE not in text and "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text
    assert (
        not re.search(r"(?:src|href)=\"(?!data:|#)", text)
        and not re.search(r"url\((?!#)", text)
        and "@import" not in text
    )
    pictures = re.findall(r"<img [^>]*>", text)
    assert len(pictures) > 10 and all(" alt=" in each for each in pictures)
    assert text.count("<script>") == 1 and text.count("</script>") == 1
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "Limit broken" in text and report.stat().st_size < 2_000_000


def needs_a_browser(test):
    """Passed over without a browser; with NEMO_PRUNE_NEEDS_BROWSER=1 a missing one is a failure that says so."""
    try:
        find_browser()
        absent = False
    except NoBrowser:
        absent = os.environ.get("NEMO_PRUNE_NEEDS_BROWSER") != "1"
    return pytest.mark.skipif(absent, reason="no Chromium; NEMO_PRUNE_NEEDS_BROWSER=1 makes that a failure")(test)


@needs_a_browser
def test_a_browser_opens_sorts_filters_and_enlarges_without_an_error(report, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.look(1200, 900)
        page.open(report)
        assert page.run("document.title").startswith("Evidence: ")
        first = "document.querySelector('#prompts tbody tr td.number').textContent"
        assert page.run(first) == "3"
        page.click("#prompts th:nth-child(4) button")
        assert page.run(first) == "0"
        assert page.run("document.querySelector('#prompts th:nth-child(4)').ariaSort") == "ascending"
        page.click("#prompts th:nth-child(4) button")
        assert page.run(first) == "3"
        page.type("#filter-prompts", "unresolved")
        assert page.run("[...document.querySelectorAll('#prompts tbody tr')].filter(row => !row.hidden).length") == 1
        page.type("#filter-captions", "cat zan")
        assert page.run("[...document.querySelectorAll('.card')].filter(card => !card.hidden).length") == 1
        assert not page.run("document.querySelector('dialog').open")
        page.click(".strip button")
        assert page.run("document.querySelector('dialog').open")
        assert page.run("document.querySelector('dialog img').alt") == "Training image of: a cat zanzibar"
        page.click("dialog button")
        assert not page.run("document.querySelector('dialog').open")
        page.screenshot(tmp_path / "report.png")
        assert Image.open(tmp_path / "report.png").height > 900
        assert page.errors == []


@needs_a_browser
def test_the_report_fits_a_phone_and_is_readable_in_the_dark_and_on_paper(report, tmp_path):
    ink = "getComputedStyle(document.body).color"
    paper = "getComputedStyle(document.body).backgroundColor"
    with browser(tmp_path / "profile") as page:
        page.look(390, 844)
        page.open(report)
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        light = page.run(ink), page.run(paper)
        page.look(390, 844, dark=True)
        dark = page.run(ink), page.run(paper)
        assert light[1] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]
        assert page.run("getComputedStyle(document.querySelector('.chart svg text')).fill") == dark[0]
        page.look(800, 1100, dark=True, printed=True)
        assert (page.run(ink), page.run(paper)) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
        assert page.errors == []


@needs_a_browser
def test_a_script_in_a_page_of_this_policy_does_not_run_and_is_an_error(report, tmp_path):
    """The control of both: a caption that got through would be stopped, and the browser would say so."""
    text = report.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", f"<main>{HOSTILE}<img src='https://example.org/a.png'>"), encoding="utf-8")
    with browser(tmp_path / "profile") as page:
        page.open(broken)
        assert page.run("document.title").startswith("Evidence: ")
        assert any("Content Security Policy" in error for error in page.errors)


def test_a_missing_browser_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NEMO_PRUNE_BROWSER", raising=False)
    with pytest.raises(NoBrowser, match="apt-get install chromium"):
        find_browser()
