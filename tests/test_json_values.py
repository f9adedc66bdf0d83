"""Dataclasses to JSON and back: what comes back is the same, and what is not of its type is named by its place."""

import json
from dataclasses import dataclass, fields
from typing import Any

import pytest

from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.results import ResultsHeader
from nemo_prune.errors import RecordError
from nemo_prune.facts import BaseFacts, MaskFacts, PromptFacts, Status, StatusCounts
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.release.record import Record
from nemo_prune.screening.settings import SieveSettings
from nemo_prune.settings import LocalizationSettings, VerificationSettings
from records import changed, run_record

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
LOCALIZED = PromptLocalization(
    "a\u2028cat", "localized", 0.9, (0, 3), (Neuron("down", 1), Neuron("mid", 2)), (Neuron("down", 1),), 0.3, 0.4, 4.75,
    1, 0.01, True, False, sample_passes=99, seconds=1.5,
)  # fmt: skip
VALUES = [
    LOCALIZED,
    PromptLocalization("a dog", "not_memorized", 0.1),
    ResultsHeader("digest", {"down": 4, "mid": 8}, 0.4, {"theta": 5.0, "betas": [0.33, None, True, "x"]}),
    ScoresUnderMask(None, 0.9, 0.2),
    LocalizationSettings(threshold=0.4, projections="both"),
    VerificationSettings(guidance_scale=3.0),
    SieveSettings("norm", norm_step=25),
    run_record(licence={"fields": {"license": ["mit", "other"], "license_name": "x"}, "texts": ("LICENSE",)}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_comes_back_is_the_same(value):
    written = json.dumps(to_json(value))
    assert from_json(type(value), json.loads(written)) == value


def test_a_record_is_flat_and_comes_back_with_or_without_what_was_measured(tmp_path):
    run = run_record()
    exported = changed(run, measured=None, prompts=StatusCounts(2, 2, 0, 0, False))
    for record in (run, exported, changed(exported, prompts=None)):
        record.save(tmp_path / "record.json")
        assert Record.load(tmp_path / "record.json") == record
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    measured = {field.name for field in fields(run.measured)}
    assert measured < run.to_json().keys() and not measured & exported.to_json().keys()


def test_the_facts_of_a_mask_come_back_with_what_is_not_understood(model_folder, tmp_path):
    mask = NeuronMask.from_neurons([Neuron(MID, 1)], {MID: 8})
    facts = MaskFacts(
        base=BaseFacts("x", commit="c0ffee"),
        settings=to_json(LocalizationSettings()),
        prompts=run_record().prompts,
        versions={"torch": "2"},
        scale=-0.25,
        prompts_per_neuron={MID: {1: 3}},
        base_tensors=tensor_digests(scan_folder(model_folder), mask),
        others={"of a newer version": {"a": [1]}},
    )
    mask.save(tmp_path / "mask.safetensors", facts)
    found = NeuronMask.load_with_facts(tmp_path / "mask.safetensors")[1]
    assert {name: found.others[name] for name in facts.others} == facts.others
    assert all(getattr(found, field.name) == getattr(facts, field.name) for field in fields(facts)[:-1])
    assert isinstance(found.prompts, PromptFacts)
    newer = json.loads(json.dumps(facts.to_json()))
    newer |= {"base": {"name": "x", "colour": "red"}, "prompts": to_json(StatusCounts(1, 1, 0, 0, True))}
    assert MaskFacts.from_json(newer).base == BaseFacts("x")
    assert type(MaskFacts.from_json(newer).prompts) is StatusCounts


@dataclass(frozen=True)
class Inner:
    number: float


@dataclass(frozen=True)
class Every:
    """Every kind of type that there is in the real ones."""

    text: str = ""
    whole: int = 0
    number: float = 0.0
    flag: bool = False
    nothing: None = None
    perhaps: int | None = None
    either: str | list[str] = ""
    one_of: Status = "localized"
    many: tuple[int, ...] = ()
    some: list[float] = ()
    named: tuple[Neuron, ...] = ()
    by_name: dict[str, Inner] = None
    by_row: dict[int, int] = None
    inner: Inner | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "wrong", "place"),
    [
        ("text", 1, "text"),
        ("text", None, "text"),
        ("whole", 1.0, "whole"),
        ("whole", True, "whole"),
        ("whole", "1", "whole"),
        ("number", "1", "number"),
        ("number", True, "number"),
        ("number", 10**400, "number"),
        ("flag", 1, "flag"),
        ("nothing", 0, "nothing"),
        ("perhaps", "x", "perhaps"),
        ("either", 1, "either"),
        ("either", ["a", 1], "either.1"),
        ("one_of", "gone", "one_of"),
        ("one_of", [], "one_of"),
        ("many", {}, "many"),
        ("many", [1, 2, "3"], "many.2"),
        ("some", [None], "some.0"),
        ("named", [["down", 1], ["down"]], "named.1"),
        ("named", [["down", "1"]], "named.0"),
        ("named", [{"layer": "down", "index": 1}], "named.0"),
        ("by_name", [], "by_name"),
        ("by_name", {"a": {"number": 1}, "b": {"number": None}}, "by_name.b.number"),
        ("by_name", {"a": {}}, "by_name.a.number"),
        ("by_name", {"a": {"number": 1, "more": 2}}, "by_name.a.more"),
        ("by_row", {"x": 1}, "by_row.x"),
        ("by_row", {"-1": 1}, "by_row.-1"),
        ("by_row", {"٣": 1}, "by_row.٣"),
        ("by_row", {"1": "x"}, "by_row.1"),
        ("inner", 7, "inner"),
        ("inner", {"number": []}, "inner.number"),
        ("unknown", 1, "unknown"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(name, wrong, place):
    with pytest.raises(ValueError, match=f"`{place}`"):
        from_json(Every, {name: wrong})


def test_right_values_of_every_kind_pass():
    right = {
        "text": "x", "whole": 2**70, "number": 1, "flag": True, "nothing": None, "perhaps": None, "either": ["a"],
        "one_of": "unresolved", "many": [1], "some": [1, 0.5], "named": [["down", 1]], "by_name": {"a": {"number": 1}},
        "by_row": {"3": 1}, "inner": None, "anything": [{"x": None}],
    }  # fmt: skip
    found = from_json(Every, right)
    assert found.named == (Neuron("down", 1),) and found.by_name == {"a": Inner(1)} and found.by_row == {3: 1}
    assert from_json(Every, {**right, "more": 1}, only_known=False) == found
    for value in ([], "x", None):
        with pytest.raises(ValueError, match="`it` is"):
            from_json(Every, value)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", [{"a": b"x"}]])
def test_what_json_does_not_have_is_not_written(value):
    with pytest.raises(TypeError, match="is not a JSON value"):
        to_json(value)


def test_a_record_of_a_run_must_say_what_became_of_its_prompts(tmp_path):
    for prompts in (None, StatusCounts(2, 2, 0, 0, False)):
        changed(run_record(), prompts=prompts).save(tmp_path / "record.json")
        with pytest.raises(RecordError, match="`prompts`"):
            Record.load(tmp_path / "record.json")
