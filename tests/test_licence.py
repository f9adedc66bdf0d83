"""The licence of a release is its base's, or stated, or missing; never invented."""

import pytest

from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.errors import SettingsError
from nemo_prune.files.layout import is_licence_file
from nemo_prune.models.source import ModelSource
from nemo_prune.release.licence import licence_of
from nemo_prune.settings import Statement

COMMIT = "c0ffee" + "0" * 34


def base(folder, metadata=None, **files):
    """A base with a card, and with files beside it."""
    (folder / "model_index.json").write_text("{}")
    if metadata is not None:
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n", encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_text(content)
    return ModelSource(scan_folder(folder))


def inherited(folder, metadata, statement=None, **files):
    return licence_of(base(folder, metadata, **files), statement or Statement())


def test_fields_are_inherited_and_those_of_the_gate_are_not(tmp_path):
    licence = inherited(
        tmp_path,
        "license: creativeml-openrail-m\nlicense_link: https://example.org/x\nextra_gated_prompt: Please\ntags: [x]",
        LICENSE="the text",
    )
    assert licence.fields == {"license": "creativeml-openrail-m", "license_link": "https://example.org/x"}
    assert licence.origin == "base" and licence.base_was_gated
    assert licence.texts == ("LICENSE",) and licence.warnings() == []


@pytest.mark.parametrize(
    ("metadata", "fields"),
    [
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: other\nlicense_name: my-own", {"license": "other", "license_name": "my-own"}),
        ("license: 'a\\u2028b'\nlicense_name: [x, {y: z}]", {"license": r"a\u2028b", "license_name": ["x"]}),
        ('license: "mit\\u0000\\u202e --- # x"', {"license": "mit --- # x"}),
    ],
)
def test_lists_and_odd_values_are_inherited_as_text(tmp_path, metadata, fields):
    licence = inherited(tmp_path, metadata)
    assert licence.fields == fields and licence.origin == "base"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "tags: [x]",
        "license:",
        "license: {a: b}",
        "license: 3",
        "license_name: mine",
        "a: [",
        "- a",
        "a: !!python/x",
    ],
)
def test_a_missing_field_is_other_and_is_told(tmp_path, metadata):
    licence = inherited(tmp_path, metadata, LICENSE="the text")
    assert licence.fields == {"license": "other"} and licence.origin == "missing"
    (warning,) = licence.warnings()
    assert "--license" in warning


def test_a_card_that_is_no_text_or_is_nested_without_end_names_nothing(tmp_path):
    for content in (b"\xff\xfe", b"---\nlicense: " + b"[" * 5000 + b"\n---\n", b""):
        (tmp_path / "README.md").write_bytes(content)
        assert licence_of(base(tmp_path), Statement()).origin == "missing"


def test_a_missing_text_is_another_thing_than_a_missing_field(tmp_path):
    licence = inherited(tmp_path, "license: mit")
    (warning,) = licence.warnings()
    assert licence.origin == "base" and licence.texts == () and "text" in warning


def test_the_publisher_states_what_the_base_does_not_say(tmp_path):
    licence = inherited(tmp_path, "tags: [x]", Statement(license="other", license_name="Our Terms 1.0"))
    assert licence.fields == {"license": "other", "license_name": "Our Terms 1.0"}
    assert licence.origin == "publisher"


def test_the_publisher_can_complete_but_not_replace_the_bases_licence(tmp_path):
    source = base(tmp_path, "license: other")
    completed = licence_of(source, Statement(license="other", license_name="Our Terms"))
    assert completed.fields == {"license": "other", "license_name": "Our Terms"} and completed.origin == "base"
    with pytest.raises(SettingsError, match="says license: other, and --license says mit"):
        licence_of(source, Statement(license="mit"))
    source = base(tmp_path, "license: [mit]\nlicense_link: https://example.org/a")
    assert licence_of(source, Statement(license="mit")).fields["license"] == ["mit"]
    with pytest.raises(SettingsError, match="--license-link"):
        licence_of(source, Statement(license="mit", license_link="https://example.org/b"))


def test_a_link_to_a_file_leads_to_the_copy_or_to_the_base_at_its_commit_or_is_dropped(tmp_path):
    card = "license: other\nlicense_name: x\nlicense_link: docs/terms of use.md"
    assert "license_link" not in inherited(tmp_path, card).fields
    hub = ModelSource(scan_folder(tmp_path), "owner/base", COMMIT)
    link = f"https://huggingface.co/owner/base/blob/{COMMIT}/docs/terms%20of%20use.md"
    assert licence_of(hub, Statement()).fields["license_link"] == link
    beside = inherited(tmp_path, "license: other\nlicense_link: LICENSE.md", **{"LICENSE.md": "text"})
    assert beside.fields["license_link"] == "LICENSE.md"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("LICENSE", "license.txt", "LICENCE.md", "Model_License.pdf", "LICENSE-2.0")),
        *((name, True) for name in ("NOTICE", "COPYING", "use_policy.md")),
        *((name, False) for name in ("README.md", "license.safetensors", "LICENSE.py", "licenses.json", "unet")),
    ],
)
def test_licence_texts_are_known_by_their_names_and_copied(tmp_path, name, is_one):
    assert is_licence_file(name) is is_one
    source = base(tmp_path, None, **{name: "text"})
    assert [path.name for path in source.files.kept] == sorted(["model_index.json", *[name] * is_one])


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ({"license": "Apache 2"}, "repositories-licenses"),
        ({"license": "mit\nlicense_name: x"}, "identifier"),
        ({"license": "other"}, "license_name"),
        ({"license_name": "x"}, "without `license`"),
        ({"license": "other", "license_name": "a\nb"}, "letters"),
        ({"license": "mit", "license_link": "javascript:alert(1)"}, "https://"),
        ({"base_model": "../x"}, "Hub id"),
        ({"base_model": "a/b/c"}, "Hub id"),
    ],
)
def test_what_can_not_be_stated_is_refused(statement, word):
    with pytest.raises(SettingsError, match=word):
        Statement(**statement)
