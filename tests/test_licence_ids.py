"""Licences are checked against the Hub's list before any work; an unreadable card is not one without a licence."""

import pytest
from typer.testing import CliRunner

from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.errors import ModelError, SettingsError
from nemo_prune.files.licence_ids import LICENCE_IDS, known_licence
from nemo_prune.models.source import ModelSource
from nemo_prune.release.licence import licence_notice, licence_of
from nemo_prune.screening.settings import SieveSettings
from nemo_prune.settings import LocalizationSettings, Statement


def base(folder, card=None):
    """A base with a card, given as its bytes or as the lines of its metadata."""
    (folder / "model_index.json").write_text("{}")
    if card is not None:
        content = card if isinstance(card, bytes) else f"---\n{card}\n---\n# A model\n".encode()
        (folder / "README.md").write_bytes(content)
    return ModelSource(scan_folder(folder))


def fields(folder, card, statement=Statement()):
    return dict(licence_of(base(folder, card), statement).fields)


def test_the_list_has_what_models_of_this_family_are_published_under():
    assert {"creativeml-openrail-m", "openrail++", "openrail", "mit", "apache-2.0", "unknown", "other"} <= LICENCE_IDS
    assert all(known_licence(each) == each for each in LICENCE_IDS)
    assert known_licence("CreativeML-OpenRAIL-M ") == "creativeml-openrail-m"
    assert known_licence("creativeml-openrail") is None


@pytest.mark.parametrize("stated", ["MIT", "mit", "Apache-2.0", "OpenRAIL++"])
def test_a_stated_licence_is_taken_in_any_case(stated):
    assert Statement(license=stated).license == stated.lower()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("creativeml-openrail", r"--license 'creativeml-openrail'.*Is it creativeml-openrail-m"),
        ("Apache 2", r"Is it apache-2\.0"),
        ("my-own-terms", r"--license other --license-name NAME"),
        ("mit\nlicense_name: x", "repositories-licenses"),
        ("", "repositories-licenses"),
    ],
)
def test_an_unknown_stated_licence_is_refused_with_what_was_meant(stated, message):
    with pytest.raises(SettingsError, match=message):
        Statement(license=stated)


@pytest.mark.parametrize("command", [["run", "--model", "nowhere"], ["export", "--model", "nowhere", "--mask", "none"]])
def test_the_command_line_refuses_it_before_it_looks_for_the_model(tmp_path, command):
    for options, message in (
        (["--license", "creativeml"], "--license 'creativeml'"),
        (["--license", "other"], "--license-name is not given"),
        (["--license-name", "x"], "none without --license"),
    ):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), *options])
        assert result.exit_code == 1 and message in result.stderr, result.output
        assert "license_name" not in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalizationSettings(num_samples=1), "--num-samples is 1"),
        (lambda: LocalizationSettings(theta_step=0.0), "`theta_step` is 0"),
        (lambda: SieveSettings(num_samples=0), "--sieve-samples is 0"),
    ],
)
def test_messages_name_options_as_they_are_typed(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("license: MIT", {"license": "mit"}),
        ("license: CreativeML-OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("license: creativeml", {"license": "other", "license_name": "creativeml"}),
        (
            "license: Fair AI Public License 1.0-SD",
            {"license": "other", "license_name": "fair-ai-public-license-1.0-sd"},
        ),
        ("license: mine\nlicense_name: Our Terms", {"license": "other", "license_name": "Our Terms"}),
        ("license: [MIT, mine]", {"license": ["mit", "other"], "license_name": "mine"}),
        ("license: other\nlicense_name: x", {"license": "other", "license_name": "x"}),
    ],
)
def test_an_inherited_licence_is_one_that_the_hub_accepts(tmp_path, card, expected):
    licence = licence_of(base(tmp_path, card), Statement())
    assert (dict(licence.fields), licence.origin) == (expected, "base")
    assert expected.get("license_name", "") in licence_notice(licence)


def test_what_the_base_says_in_other_words_is_no_contradiction(tmp_path):
    assert fields(tmp_path, "license: MIT", Statement(license="Mit")) == {"license": "mit"}
    named = Statement(license="other", license_name="mine")
    assert fields(tmp_path, "license: mine", named) == {"license": "other", "license_name": "mine"}
    with pytest.raises(SettingsError, match="and --license says mit"):
        fields(tmp_path, "license: mine", Statement(license="mit"))


UTF16 = "---\nlicense: mit\n---\n".encode("utf-16")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("license: mit\na: [", r"README\.md, can't be read.*in line 3"),
        ("- license: mit", "can't be read"),
        ("license: mit\na: !!python/object:x.y {}", "can't be read"),
        ("license: " + "[" * 5000, "can't be read"),
        (UTF16, "not UTF-8"),
        ("---\nlicense: mit\ntitle: Café\n---\n".encode("latin-1"), "not UTF-8"),
        (b"---\nlicense: mit\n# A model\n", "they have no end"),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n# A model\r\n", "they have no end"),
        ("license: 3", "license: 3, expected is an identifier"),
        ("license: {a: b}", "expected is an identifier"),
    ],
)
@pytest.mark.parametrize("statement", [Statement(), Statement(license="mit")])
def test_a_card_that_can_not_be_read_is_an_error_also_where_a_licence_is_stated(tmp_path, card, message, statement):
    with pytest.raises(ModelError, match=message):
        licence_of(base(tmp_path, card), statement)


@pytest.mark.parametrize(
    "card", [None, b"", b"# A model\n\n---\n\nlicense: mit\n", "tags: [x]", "license:", "license_name: x"]
)
def test_a_card_that_names_none_is_another_thing(tmp_path, card):
    licence = licence_of(base(tmp_path, card), Statement())
    assert (dict(licence.fields), licence.origin) == ({"license": "other"}, "missing")
    assert licence_of(base(tmp_path, card), Statement(license="MIT")).fields == {"license": "mit"}


def test_a_card_with_a_byte_order_mark_and_line_breaks_of_windows_is_read(tmp_path):
    assert fields(tmp_path, b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# A model\r\n") == {"license": "mit"}
