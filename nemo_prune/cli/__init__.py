"""The command line: a thin skin over the library, one file per command. Heavy imports wait inside the commands."""

import sys

# Importing a command adds it to the program, in the order of the help.
# isort: off
from nemo_prune.cli import run, screen, calibrate, localize, merge, export, verify, diff, inspect, push, demo  # noqa: F401

# isort: on
from nemo_prune.cli.console import app

__all__ = ["app", "entry"]


def entry() -> None:
    """The console script."""
    sys.exit(app())
