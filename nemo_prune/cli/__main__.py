"""`python -m nemo_prune.cli`."""

from nemo_prune.cli import entry

entry()
