"""docs/commands.md, made from the program: `python -m nemo_prune.cli.reference > docs/commands.md`."""

import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, get_args

from typer.main import get_command

from nemo_prune.cli import app
from nemo_prune.cli.options import CAPTIONS, HUB, MEASURING, METHOD, MODEL, RELEASE

_HEAD = """# Commands

*Made from the program by `python -m nemo_prune.cli.reference`; `nemo-prune COMMAND --help` says the same.*"""
_NO_PANEL = "Options"
_PANELS = (MODEL, CAPTIONS, METHOD, MEASURING, RELEASE, HUB, _NO_PANEL)
_EXAMPLE = re.compile(r"\n*Example: `(?P<command>.*)`")
_TABLE = "| {} | meaning |\n|---|---|\n{}"


def command_reference() -> str:
    """Every command with its help, its example and its arguments and options, as Markdown."""
    program = get_command(app)
    sections = [_HEAD, program.help, _table("option", program.params)]
    for name, command in program.commands.items():
        sections += [f"## nemo-prune {name}", *_command(command)]
    return "\n\n".join(sections) + "\n"


def _command(command: Any) -> Iterator[str]:
    """The parts of one command's section."""
    yield _EXAMPLE.sub("", command.help)
    yield f"```bash\n{_EXAMPLE.search(command.help)['command']}\n```"
    choices = _choices(command)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    if arguments:
        yield _table("argument", arguments)
    options = [each for each in command.params if each.param_type_name == "option"]
    for panel in _PANELS:
        inside = [each for each in options if (getattr(each, "rich_help_panel", None) or _NO_PANEL) == panel]
        if inside:
            yield f"**{panel}**"
            yield _table("option", inside, choices)


def _choices(command: Any) -> dict[str, list[str]]:
    """The values of the options that take one of some, by the option's name."""
    found = {}
    for name, parameter in inspect.signature(command.callback).parameters.items():
        # Annotated[Choice, ...] or Annotated[Choice | None, ...].
        annotated = get_args(parameter.annotation)[:1]
        for each in (*annotated, *(get_args(annotated[0]) if annotated else ())):
            if isinstance(each, type) and issubclass(each, Enum):
                found[name] = [choice.value for choice in each]
    return found


def _table(kind: str, parameters: list, choices: Mapping[str, list[str]] = MappingProxyType({})) -> str:
    rows = [f"| {_name(each)} | {_meaning(each, choices.get(each.name, []))} |" for each in parameters]
    return _TABLE.format(kind, "\n".join(rows))


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    required = ", required" if parameter.required else ""
    return ", ".join(f"`{name}`" for name in parameter.opts) + required


def _meaning(parameter: Any, choices: list[str]) -> str:
    """The help text, with the choices and the default."""
    text = parameter.help.replace("|", "\\|")
    if choices and not all(f"`{choice}`" in text for choice in choices):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = getattr(parameter.default, "value", parameter.default)
    # Flags are off unless given, and where there is no default the help says what holds.
    if default is None or default is False:
        return text
    return f"{text} (default: {default:g})" if isinstance(default, float) else f"{text} (default: {default})"


if __name__ == "__main__":
    print(command_reference(), end="")
