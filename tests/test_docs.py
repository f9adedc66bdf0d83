"""README, --help and code agree where it can be checked."""

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import nemo_prune
from nemo_prune.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme_and_has_help_with_an_example(name):
    assert f"nemo-prune {name}" in README
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(app, [name, flag])
        assert result.exit_code == 0 and f"Example: nemo-prune {name}" in result.stdout


def test_every_option_is_in_the_readme_and_has_a_help_text():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert parameter.opts[0] in README, f"{name} {parameter.opts[0]}"
                assert parameter.help


def test_every_option_that_the_readme_names_exists():
    options = {opt for command in COMMANDS.values() for parameter in command.params for opt in parameter.opts}
    for block in re.findall(r"nemo-prune run [^`\n]*", README):
        for option in re.findall(r"--[a-z-]+", block):
            assert option in options, option


def test_every_public_name_can_be_imported_and_is_documented():
    for name in nemo_prune.__all__:
        assert getattr(nemo_prune, name).__doc__


def test_the_changelog_speaks_of_what_is_unreleased():
    assert re.search(r"## Unreleased\n\n- ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
