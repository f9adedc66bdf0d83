"""The command line: a thin skin over the library, a file a command. Heavy imports wait inside the commands."""

import sys

# Importing a command adds it to the program, in the order in which the help lists them.
from nemo_prune.cli import calibrate, demo, diff, export, inspect, localize, merge, push, run, screen  # noqa: F401
from nemo_prune.cli.console import app

__all__ = ["app", "entry"]


def entry() -> None:
    """The console script."""
    sys.exit(app())
