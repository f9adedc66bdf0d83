"""The program and what its commands share: named errors, the progress bar, quiet libraries."""

import os
from collections.abc import Callable, Iterator
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
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nemo_prune import __version__
from nemo_prune.errors import NemoPruneError
from nemo_prune.files.untrusted import printable

_STAGE_NAMES = {
    "load": "Load the model",
    "calibrate": "Calibrate",
    "sieve ordinary": "Sieve ordinary captions",
    "sieve": "Sieve",
    "score what passed": "Score what passed",
    "confirm on images": "Confirm on images",
    "weigh neurons": "Weigh the neurons",
    "localize": "Localize",
    "merge": "Merge",
    "score again": "Score under the mask",
    "images before": "Images before",
    "export": "Export",
    "images after": "Images after",
    "check files": "Check the files",
    "upload": "Upload, megabytes",
}

app = typer.Typer(
    help="Find the neurons that make a text-to-image model give training images back, and prune them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
    """Find the neurons that make a text-to-image model give training images back, and prune them."""


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
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from interrupt


class _Speed(ProgressColumn):
    """Prompts a second, once it is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} prompts/s" if task.speed else "")


@contextmanager
def progress_bar(
    quiet: bool, show_speed: bool = False, first: str = "Load the model"
) -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr: stage, i of N, time left; off where stderr is no terminal.

    Args:
        quiet: show nothing.
        show_speed: also show prompts a second.
        first: what is done until a stage is told.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               *([_Speed()] if show_speed else []))  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(first, total=None)
        stage_shown = ""

        def update(stage: str, done: int, total: int) -> None:
            nonlocal stage_shown
            if stage != stage_shown:
                stage_shown = stage
                # What an earlier run did must not count as speed.
                bar.reset(task, description=_STAGE_NAMES[stage], total=total, completed=done)
            bar.update(task, completed=done)

        yield update


def tell(message: str) -> None:
    """Say something on stderr while the command goes on; a progress bar stays below it."""
    typer.echo(printable(message), err=True)


def quieten_hub_client() -> None:
    """The Hub's client has bars of its own and tells of every retry, with addresses; who asks for that gets it."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    disable_progress_bars()
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & set(os.environ):
        set_verbosity_error()


def quieten_libraries() -> None:
    """Stock loaders chat about optional parts that are none of the user's business here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_diffusers_bar()
    disable_transformers_bar()
