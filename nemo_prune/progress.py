"""How long work tells what it is at: callbacks go in, and by default nobody hears them."""

from collections.abc import Callable

# Called with the stage's name, what is done and how much there is.
Progress = Callable[[str, int, int], None]
# Called with what the user should know while the work goes on.
Notify = Callable[[str], None]


def silently(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


def unheard(message: str) -> None:
    """Nobody listens."""
