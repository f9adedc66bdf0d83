"""README, docs, --help, examples and code agree where it can be checked."""

import doctest
import functools
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import nemo_prune
from nemo_prune.cli import app
from nemo_prune.cli.reference import command_reference
from nemo_prune.models.demo import demo_folder
from nemo_prune.settings import MIN_CALIBRATION_PROMPTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
COMMANDS = get_command(app).commands
OPTIONS = {opt for command in COMMANDS.values() for parameter in command.params for opt in parameter.opts}
MOST_WORDS = 1300
# Users copy these two; whoever changes one changes what an installation is.
RUN_THE_DEMO = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && "
    ".venv/bin/nemo-prune run --model demo --out pruned/"
)
RUN_THE_TESTS = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ".[test]" && .venv/bin/pytest'


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(app, [name, flag])
        assert result.exit_code == 0 and f"Example: nemo-prune {name}" in result.stdout


def test_run_is_the_first_command_of_the_help():
    assert next(iter(COMMANDS)) == "run"


def test_the_page_of_the_commands_is_what_the_program_says_now():
    page = PAGES["docs/commands.md"]
    assert page == command_reference(), "Renew it: python -m nemo_prune.cli.reference > docs/commands.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_every_option_and_argument_of_a_command_with_its_help(name):
    (section,) = re.findall(rf"^## nemo-prune {name}\n(.*?)(?=^## |\Z)", command_reference(), re.MULTILINE | re.DOTALL)
    for parameter in COMMANDS[name].params:
        is_option = parameter.param_type_name == "option"
        shown = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
        assert f"| `{shown}`" in section, shown
        assert parameter.help and parameter.help.replace("|", "\\|") in section, shown


def test_the_page_names_the_choices_that_a_help_text_leaves_out_and_the_defaults():
    page = command_reference()
    assert (
        "keeps the precision of the files. One of `auto`, `float32`, `float16`, `bfloat16`. (default: auto) |" in page
    )
    assert "(default: 1) |" in page


def test_readme_and_docs_name_only_options_and_commands_that_exist():
    for page in (README, PAGES["docs/files.md"]):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", page):
            assert option in OPTIONS, option
    for name, page in {"README.md": README, **PAGES}.items():
        for command in re.findall(r"(?:`|^)nemo-prune ([a-z]+)", page, re.MULTILINE):
            assert command in COMMANDS, f"{name}: {command}"


def test_links_between_readme_docs_and_other_files_lead_somewhere():
    for name, page in {"README.md": README, **PAGES}.items():
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_the_two_commands_stand_in_a_readme_that_is_short():
    for command in (RUN_THE_DEMO, RUN_THE_TESTS):
        assert f"```bash\n{command}\n```" in README
    assert len(README.split()) <= MOST_WORDS


def test_every_public_name_can_be_imported_and_is_documented():
    for name in nemo_prune.__all__:
        assert getattr(nemo_prune, name).__doc__


def test_the_readme_and_the_packages_docstring_have_the_same_example():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in block.splitlines() if line and not line.startswith("print")]
    example = [each.source.rstrip() for each in doctest.DocTestParser().get_examples(nemo_prune.__doc__)]
    assert lines == example[: len(lines)]


@pytest.mark.slow
def test_the_example_in_the_packages_docstring_does_what_it_says(tmp_path, monkeypatch):
    """With fewer ordinary captions to calibrate on, and fewer images in fewer steps."""
    monkeypatch.chdir(tmp_path)
    ordinary = nemo_prune.ordinary_captions("demo")
    few = replace(ordinary, texts=ordinary.texts[:MIN_CALIBRATION_PROMPTS])
    monkeypatch.setattr(nemo_prune, "ordinary_captions", lambda model: few)
    quick = functools.partial(nemo_prune.VerificationSettings, num_inference_steps=5, ordinary_images=1)
    monkeypatch.setattr(nemo_prune, "VerificationSettings", quick)
    found = doctest.testmod(nemo_prune)
    assert found.attempted and not found.failed


@pytest.mark.slow
def test_the_quickstart_runs_and_takes_only_public_names(tmp_path, monkeypatch, capsys):
    path = ROOT / "examples" / "quickstart.py"
    assert re.findall(r"^from (nemo_prune\S*)", path.read_text(encoding="utf-8"), re.MULTILINE) == ["nemo_prune"]
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "pruned")])
    runpy.run_path(str(path), run_name="__main__")
    assert (tmp_path / "pruned" / "model_index.json").is_file()
    assert (tmp_path / "pruned.work" / "live.png").is_file()
    said = capsys.readouterr().out
    assert "Images after" in said and re.search(r"[1-9]\d* neurons? pruned", said)


def test_the_figures_of_the_demo_are_those_of_its_card():
    (figures,) = re.findall(r"<!-- figures: begin -->\n(.*?)\n<!-- figures: end -->", PAGES["docs/demo.md"], re.DOTALL)
    assert figures in (demo_folder() / "README.md").read_text(encoding="utf-8")


def test_the_changelog_speaks_of_what_is_unreleased():
    assert re.search(r"## Unreleased\n\n- ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
