"""Many searches side by side: the questions of all of them fill batches together."""

import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.trials import Trial

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

Asked = tuple[ScoredPrompt, Trial]
# A search whose questions name their prompt.
Questions = Generator[list[Asked], list[float], Result]
Answer = Callable[[list[Asked]], list[float]]


@dataclass(frozen=True)
class Finished(Generic[Key, Result]):
    """A search that ended.

    Attributes:
        key: what it was added as.
        result: what it found.
        sample_passes: latents that went through the U-Net for it.
        seconds: its share of the wall time.
    """

    key: Key
    result: Result
    sample_passes: int
    seconds: float


@dataclass(eq=False)
class _Running(Generic[Key, Result]):
    """A search and what it waits for."""

    key: Key
    questions: Questions[Result]
    asked: list[Asked] = field(default_factory=list)
    answers: list[float | None] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    open: int = 0
    sample_passes: float = 0.0
    seconds: float = 0.0


class Pool(Generic[Key, Result]):
    """Searches that are driven together; each batch takes those first that ask least at once.

    They have to wait the most often, and must not be what is left at the end; those that ask much fill the batch up.

    Args:
        answer: answers questions, as many at once as are given.
        passes: how many sample passes were made so far, which tells what the answers took.
    """

    def __init__(self, answer: Answer, passes: Callable[[], int]) -> None:
        self._answer, self._passes = answer, passes
        self._running: list[_Running[Key, Result]] = []
        self._finished: list[Finished[Key, Result]] = []

    def __len__(self) -> int:
        return len(self._running)

    def add(self, key: Key, questions: Questions[Result]) -> None:
        """Begin a search."""
        running = _Running(key, questions)
        self._running.append(running)
        self._go_on(running, None)

    def finish(self, batch_size: Callable[[], int]) -> Iterator[Finished[Key, Result]]:
        """Drive all searches to their ends; they are given as they finish."""
        yield from self.finished()
        while self._running:
            self.step(batch_size())
            yield from self.finished()

    def finished(self) -> list[Finished[Key, Result]]:
        """The searches that ended since this was asked last."""
        found, self._finished = self._finished, []
        return found

    def step(self, batch_size: int) -> None:
        """Answer one batch."""
        taken = self._next_batch(batch_size)
        began, before = time.perf_counter(), self._passes()
        answers = self._answer([running.asked[place] for running, place in taken])
        seconds = (time.perf_counter() - began) / len(taken)
        # What was answered before a stop was a pass too, and the reference's are more than one.
        passes = max(1.0, (self._passes() - before) / len(taken))
        for (running, place), answer in zip(taken, answers, strict=True):
            running.answers[place] = answer
            running.open -= 1
            running.sample_passes += passes
            running.seconds += seconds
        for running in {id(each): each for each, _ in taken}.values():
            if not running.open:
                self._go_on(running, running.answers)

    def _next_batch(self, batch_size: int) -> list[tuple["_Running[Key, Result]", int]]:
        taken: list[tuple[_Running[Key, Result], int]] = []
        for running in sorted(self._running, key=lambda each: (len(each.waiting), -each.sample_passes)):
            while running.waiting and len(taken) < batch_size:
                unit = _next_unit(running.asked, running.waiting)
                if taken and len(taken) + len(unit) > batch_size:
                    break
                for place in unit:
                    running.waiting.popleft()
                    taken.append((running, place))
            if len(taken) >= batch_size:
                break
        return taken

    def _go_on(self, running: "_Running[Key, Result]", answers: list[float] | None) -> None:
        """Send a search its answers and take its next questions, or its result."""
        try:
            asked = running.questions.send(answers)
            while not asked:
                asked = running.questions.send([])
        except StopIteration as finished:
            self._running.remove(running)
            self._finished.append(Finished(running.key, finished.value, round(running.sample_passes), running.seconds))
            return
        running.asked, running.answers = asked, [None] * len(asked)
        running.waiting, running.open = deque(range(len(asked))), len(asked)


def units_of(trials: Sequence[Trial], prompt_of: Callable[[Trial], Hashable]) -> Iterator[list[Trial]]:
    """Trials in their order, those that must be asked in the same call together.

    Args:
        trials: what is asked.
        prompt_of: names the prompt of a trial.
    """
    unit: list[Trial] = []
    for trial in trials:
        if unit and not (
            trial.at_once
            and unit[0].at_once
            and trial.neurons == unit[0].neurons
            and prompt_of(trial) == prompt_of(unit[0])
        ):
            yield unit
            unit = []
        unit.append(trial)
    if unit:
        yield unit


def batches_of(trials: Sequence[Trial], size: int, prompt_of: Callable[[Trial], Hashable]) -> Iterator[list[Trial]]:
    """Trials in their order, in batches that part none that must be asked in the same call.

    Args:
        trials: what is asked.
        size: of a batch; what must be asked together is not parted where it is larger.
        prompt_of: names the prompt of a trial.
    """
    batch: list[Trial] = []
    for unit in units_of(trials, prompt_of):
        if batch and len(batch) + len(unit) > size:
            yield batch
            batch = []
        batch.extend(unit)
    if batch:
        yield batch


def _next_unit(asked: Sequence[Asked], waiting: deque[int]) -> list[int]:
    """The places of the next question and of those that must be asked in the same call."""
    first = waiting[0]
    if not asked[first][1].at_once:
        return [first]
    trials = [asked[place][1] for place in waiting if asked[place][0] is asked[first][0]]
    return list(waiting)[: len(next(units_of(trials, lambda trial: 0)))]
