"""The program and what its commands share: named errors, the progress bar, JSON, quiet libraries."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nemo_prune import __version__
from nemo_prune.errors import NemoPruneError
from nemo_prune.files.untrusted import printable
from nemo_prune.progress import Advance, Listener, Stage

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find the neurons that make a text-to-image model give training images back, and prune them.

    Exit codes: 0 done, 1 a named error (of `diff` also a difference), 2 wrong usage, 130 interrupted.
    """


@contextmanager
def errors_reported() -> Iterator[None]:
    """The one place that catches errors: exit code 1 for a named one, 130 when interrupted."""
    console = Console(stderr=True)
    try:
        yield
    except NemoPruneError as error:
        console.print("[bold red]Error:[/]", end=" ")
        console.print(printable(str(error)), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        console.print("Stopped. Run the same command again to resume.")
        raise typer.Exit(130) from interrupt


class _Speed(ProgressColumn):
    """Prompts per second, once they are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} prompts/s" if task.speed else "")


class ConsoleListener(Listener):
    """Shows one bar on stderr, with the stage, i of N and the time left; messages appear above it.

    Args:
        bar: the bar.
        task: its only task.
    """

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Advance]:
        begun = False

        def advance(done: int, total: int) -> None:
            nonlocal begun
            if begun:
                self._bar.update(self._task, completed=done, total=total)
            else:
                # The work of an earlier run must not count as speed.
                begun = True
                self._bar.reset(self._task, description=stage.label, total=total, completed=done)

        self._bar.reset(self._task, description=stage.label, total=None)
        yield advance

    def say(self, text: str) -> None:
        tell(text)


@contextmanager
def console_listener(quiet: bool, show_speed: bool = False) -> Iterator[Listener]:
    """A listener for the terminal; its bar is off where stderr is not a terminal.

    Args:
        quiet: show no bar.
        show_speed: also show prompts per second.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               *([_Speed()] if show_speed else []))  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        yield ConsoleListener(bar, bar.add_task(Stage.LOAD.label, total=None))


def tell(message: str) -> None:
    """Say something on stderr while the command goes on; a progress bar stays below it."""
    typer.echo(printable(message), err=True)


def print_json(values: object) -> None:
    """The one JSON object of a command, on stdout."""
    typer.echo(json.dumps(values, indent=2))


def quieten_hub_client() -> None:
    """Silence the Hub client's own bars and its message per retry, with addresses, unless the user asks for them."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    disable_progress_bars()
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & set(os.environ):
        set_verbosity_error()


def quieten_libraries() -> None:
    """Silence the stock loaders' remarks on optional parts, which do not matter here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_diffusers_bar()
    disable_transformers_bar()
