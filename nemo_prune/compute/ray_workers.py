"""A session whose model is on the workers of a Ray cluster: the extra `nemo-prune[ray]`.

Chunks of the work go to whichever worker is free. If a worker dies, another repeats its chunk, and a new worker takes
its place. Ray's own restarts are not used: an actor that waits for its restart keeps its chunk, forever if no machine
is left for it.
"""

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any

from nemo_prune import __version__
from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.ray_cluster import connect, free_places, import_ray, resource_for
from nemo_prune.compute.session import Chunk, Result, Session
from nemo_prune.errors import NemoPruneError, WorkerError
from nemo_prune.models.source import ModelSource, find_again
from nemo_prune.settings import LocalizationSettings, ModelOptions

_MOST_TEXTS_IN_A_CHUNK = 64
_CHUNKS_A_WORKER = 4
_SECONDS_TO_BEGIN = 300
_SECONDS_BETWEEN_LOOKS = 5


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        host: name of the machine.
        pid: its process there.
        version: of nemo-prune there.
    """

    host: str
    pid: int
    version: str


class _Actor:
    """What runs on a worker: a session of its own."""

    def __init__(self, source: ModelSource, options: ModelOptions, settings: LocalizationSettings) -> None:
        # The model is loaded later: an error here would reach the driver as a death, an error of a method as it is.
        self._model = source, options, settings

    def begin(self) -> Place:
        """Answer as soon as the process runs."""
        return Place(platform.node(), os.getpid(), __version__)

    def load(self) -> tuple[str, dict[str, int]]:
        """Load the model; its digest and its sizes."""
        source, options, settings = self._model
        self._session = LocalSession(find_again(source), options, settings)
        return self._session.model_digest, dict(self._session.sizes)

    def do(self, task: Callable[[LocalSession, Chunk], Iterable[Result]], chunk: Chunk) -> list[Result]:
        """The results of a chunk."""
        return list(task(self._session, chunk))


@dataclass
class _Worker:
    """An actor, when it was requested, and where it runs once it has started."""

    actor: Any
    asked_for: float
    place: Place | None = None


@dataclass
class _Work:
    """A chunk, and how many workers died on it."""

    chunk: Any
    deaths: int = 0


class RaySession(Session):
    """A session whose model is on Ray workers; a context manager that ends them.

    If this process is connected to Ray already, that cluster is used, and stays connected.

    Args:
        source: the model's files.
        options: device, precision and batch size of each worker.
        settings: the numbers of the method.
        address: ``auto`` for workers on this machine, else that of a cluster, ``HOST:PORT``.
        num_workers: maximum number of workers; None takes all free GPUs, or CPUs with ``cpu``.

    Attributes:
        num_workers: maximum number of workers; they are started as the work needs them.
        workers_lost: how many died so far.
        most_deaths: how many workers may die on one chunk, or before they are ready.

    Raises:
        SettingsError: Ray is not installed, or workers can't use the device.
        WorkerError: the cluster can't be reached or lacks what is asked for.
        ModelError: the workers can't load the model.
    """

    def __init__(
        self,
        source: ModelSource,
        options: ModelOptions,
        settings: LocalizationSettings,
        address: str,
        num_workers: int | None = None,
    ) -> None:
        self._resource, device = resource_for(options.device)
        self.source, self.options, self.settings = source, options.on(device), settings
        self._ray = import_ray()
        self._owns_connection = not self._ray.is_initialized()
        self.workers_lost, self._failed_starts, self.most_deaths = 0, 0, 3
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._working: dict[Any, tuple[_Worker, _Work]] = {}
        self._model: tuple[str, dict[str, int]] | None = None
        try:
            if self._owns_connection:
                connect(self._ray, address)
            self.num_workers = free_places(self._ray, self._resource, num_workers)
            while self._model is None:
                if not self._starting:
                    self._start_worker()
                self._take_a_step(deque())
        except BaseException:
            self.close()
            raise
        self.model_digest, self.sizes = self._model

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def places(self) -> list[Place]:
        """Where the started workers run."""
        return [worker.place for worker in self._workers if worker.place]

    def close(self) -> None:
        """End the workers, and the connection to Ray if it was made here."""
        if self._ray.is_initialized():
            for worker in list(self._workers):
                self._end(worker)
            if self._owns_connection:
                self._ray.shutdown()

    def chunks_of(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Several chunks per worker: all end at about the same time, and little is lost with one."""
        size = ceil(len(texts) / (_CHUNKS_A_WORKER * self.num_workers))
        size = min(max(size, 1), _MOST_TEXTS_IN_A_CHUNK)
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def map(self, task: Callable[[LocalSession, Chunk], Iterable[Result]], chunks: Iterable[Chunk]) -> Iterator[Result]:
        """Do a task on chunks of the work, each on a free worker; see :meth:`Session.map`.

        Raises:
            WorkerError: a chunk's workers died again and again, or no worker can start.
        """
        task, fresh, waiting = self._ray.put(task), iter(chunks), deque[_Work]()
        try:
            self._give_out(task, fresh, waiting)
            while self._working or waiting:
                results = self._take_a_step(waiting)
                # Workers go on while the results are written.
                self._give_out(task, fresh, waiting)
                yield from results
        finally:
            # Results started for a caller that went away would appear in the next map.
            for worker, _ in list(self._working.values()):
                self._end(worker)

    def _give_out(self, task: Any, fresh: Iterator[Chunk], waiting: deque[_Work]) -> None:
        """Give chunks to free workers; start workers while there is more to do than they can take."""
        while self._idle or len(self._workers) < self.num_workers:
            if len(waiting) <= len(self._starting):
                waiting.extend(_Work(chunk) for chunk in islice(fresh, 1))
            if waiting and self._idle:
                worker, work = self._idle.pop(), waiting.popleft()
                self._working[worker.actor.do.remote(task, work.chunk)] = worker, work
            elif len(waiting) > len(self._starting):
                self._start_worker()
            else:
                return

    def _start_worker(self) -> None:
        on_gpu = self._resource == "GPU"
        actor_class = self._ray.remote(num_gpus=int(on_gpu), num_cpus=int(not on_gpu))(_Actor)
        actor = actor_class.remote(self.source, self.options, self.settings)
        worker = _Worker(actor, time.monotonic())
        self._workers.append(worker)
        self._starting[actor.begin.remote()] = worker

    def _take_a_step(self, waiting: deque[_Work]) -> list:
        """Wait until something happens with one worker; the results, if it finished a chunk."""
        answer = self._wait()
        if answer in self._starting:
            worker = self._starting.pop(answer)
            try:
                self._go_on_starting(worker, answer)
            except Exception:
                self._end(worker)
                raise
        elif answer in self._working:
            worker, work = self._working.pop(answer)
            self._idle.append(worker)
            try:
                return self._value(answer)
            except self._deaths as death:
                self._end(worker)
                self.workers_lost += 1
                work.deaths += 1
                if work.deaths > self.most_deaths:
                    raise _died_again(f"{work.deaths} workers died on the same part of the work", death) from death
                waiting.appendleft(work)
        return []

    def _go_on_starting(self, worker: _Worker, answer: Any) -> None:
        """Handle a new worker that has started, or has loaded its model and is free."""
        try:
            value = self._value(answer)
        except self._deaths as death:
            self._end(worker)
            self._failed_starts += 1
            if self._failed_starts > self.most_deaths:
                raise _died_again(f"{self._failed_starts} workers died before they were ready", death) from death
            return
        except self._ray.exceptions.RayTaskError as error:
            if worker.place is not None:
                raise
            raise WorkerError(
                f"A worker can't start: {_last_line(error)}. Is the same nemo-prune installed on every machine?"
            ) from error
        if worker.place is None:
            self._check_version(value)
            worker.place = value
            self._starting[worker.actor.load.remote()] = worker
            return
        self._model = self._model or value
        if value != self._model:
            raise WorkerError(
                f"The model's files on {worker.place.host} are not those of the first worker. Put the same files on "
                "every machine, or give a Hub id."
            )
        self._failed_starts = 0
        self._idle.append(worker)

    def _check_version(self, place: Place) -> None:
        if place.version != __version__:
            raise WorkerError(
                f"{place.host} has nemo-prune {place.version}, this machine {__version__}. Install the same on all."
            )

    def _wait(self) -> Any:
        """The next answer of any worker; None from time to time, to notice a hopeless wait."""
        answers, _ = self._ray.wait([*self._starting, *self._working], timeout=_SECONDS_BETWEEN_LOOKS)
        if answers:
            return answers[0]
        newest = max(worker.asked_for for worker in self._workers)
        nobody_began = not any(worker.place for worker in self._workers)
        if nobody_began and time.monotonic() - newest > _SECONDS_TO_BEGIN:
            raise WorkerError(
                f"No worker began within {_SECONDS_TO_BEGIN} s: another program may have taken the cluster's "
                f"{self._resource}s. Try again later: run the same command to resume."
            )
        return None

    def _value(self, answer: Any) -> Any:
        """A worker's answer; its named errors are raised as if they had happened here."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NemoPruneError):
                raise error.cause from None
            raise

    @property
    def _deaths(self) -> tuple[type[Exception], ...]:
        """The errors that mean that a worker, or its results, are lost."""
        errors = self._ray.exceptions
        return errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError

    def _end(self, worker: _Worker) -> None:
        self._ray.kill(worker.actor)
        self._workers = [each for each in self._workers if each is not worker]
        self._idle = [each for each in self._idle if each is not worker]
        self._starting = {answer: each for answer, each in self._starting.items() if each is not worker}
        self._working = {answer: (each, work) for answer, (each, work) in self._working.items() if each is not worker}


def _died_again(what: str, death: Exception) -> WorkerError:
    return WorkerError(
        f"{what}, the last of them so: {_first_line(death)} Often memory is short: use fewer "
        "workers (--ray-workers) or a smaller --batch-size. Results so far are kept: run the same command to resume."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
