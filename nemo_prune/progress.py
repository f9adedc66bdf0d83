"""Progress of long work: one listener hears stages, progress and messages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

# Called with the number done and the total.
Advance = Callable[[int, int], None]


def ignored(done: int, total: int) -> None:
    """The default for progress that nobody asked for."""


class Stage(Enum):
    """A part of the work that takes a while.

    Attributes:
        key: how records and JSON name it.
        label: how a terminal names it.
    """

    LOAD = "load", "Load the model"
    CALIBRATE = "calibrate", "Calibrate"
    SIEVE_ORDINARY = "sieve ordinary", "Sieve ordinary captions"
    SIEVE = "sieve", "Sieve"
    SCORE_PASSED = "score what passed", "Score what passed"
    CONFIRM = "confirm on images", "Confirm on images"
    WEIGH = "weigh neurons", "Weigh the neurons"
    LOCALIZE = "localize", "Localize"
    MERGE = "merge", "Merge"
    COMPENSATE = "compensate", "Compensate for what is pruned"
    HOLD = "hold", "Hold what is left"
    PURSUE = "pursue", "Search until nothing copies"
    SPARE = "spare", "Spare ordinary captions"
    JUDGE = "judge", "Judge what is gone"
    SCORE_AGAIN = "score again", "Score under the mask"
    IMAGES_BEFORE = "images before", "Images before"
    EXPORT = "export", "Export"
    IMAGES_AFTER = "images after", "Images after"
    REPLICATION = "replication", "Draw what may come back"
    UTILITY = "utility", "Measure what it still can do"
    ATTACK = "attack", "Attack the embeddings"
    MEMBERSHIP = "membership", "Infer membership"
    VARIANTS = "variants", "Ask in other ways"
    REGROWTH = "regrowth", "See what grows back"
    ROOTS = "roots", "Look for cut rows"
    RECALL = "recall", "See what each mask awakens"
    CHECK_RELEASE = "check release", "Look at the release"
    CHECK_FILES = "check files", "Check the files"
    UPLOAD = "upload", "Upload, megabytes"

    def __init__(self, key: str, label: str) -> None:
        self.key, self.label = key, label


class Listener:
    """Hears how long work goes on. This one ignores everything; a user interface overrides both methods."""

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Advance]:
        """A stage begins, and ends with the context.

        Yields:
            What the stage calls with its progress.
        """
        yield ignored

    def say(self, text: str) -> None:
        """Something that the user should know while the work goes on."""


class Timed(Listener):
    """Passes everything on and notes how long each stage takes.

    Args:
        listener: the one that hears it.

    Attributes:
        seconds: wall time per stage, by the stage's key.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Advance]:
        began = time.perf_counter()
        with self._listener.stage(stage) as advance:
            yield advance
        self.seconds[stage.key] = round(time.perf_counter() - began, 2)

    def say(self, text: str) -> None:
        self._listener.say(text)
