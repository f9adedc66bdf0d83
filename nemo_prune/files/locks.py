"""Locks between processes: one writes, another waits or is told. The system frees the lock of a process that dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is told of another process there.
    fcntl = None

from nemo_prune.errors import NemoPruneError, OutputError

# Locks that this process keeps until it ends: real path of the file -> the open file.
_kept: dict[Path, BufferedIOBase] = {}


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Wait until no other process has the lock, and have it while the context lasts.

    Args:
        path: the file of the lock; it stays.

    Raises:
        OutputError: it can't be made.
    """
    with _opened(path) as file:
        _lock(file, wait=True)
        yield


@contextmanager
def sole_lock(path: Path, busy: NemoPruneError) -> Iterator[None]:
    """Have a lock while the context lasts, or be refused at once.

    Args:
        path: the file of the lock; it is removed at the end.
        busy: raised where another process has the lock.

    Raises:
        OutputError: the file can't be made.
    """
    with _opened(path) as file:
        # The process that had it may have removed it since: then this is the lock of a file that is not there any more.
        if not _lock(file, wait=False) or not _is_still_at(file, path):
            raise busy
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock_for_this_process(path: Path, busy: NemoPruneError) -> None:
    """Have a lock until this process ends, or be refused at once; a process that has it already may ask again.

    Args:
        path: the file of the lock; it stays.
        busy: raised where another process has the lock.

    Raises:
        OutputError: the file can't be made.
    """
    path = Path(os.path.realpath(path))
    if path in _kept and _is_still_at(_kept[path], path):
        return
    file = _opened(path)
    if not _lock(file, wait=False):
        file.close()
        raise busy
    if path in _kept:
        _kept[path].close()
    _kept[path] = file


def _opened(path: Path) -> BufferedIOBase:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error}. Mend the rights, or choose another place.") from error


def _lock(file: BufferedIOBase, wait: bool) -> bool:
    """Lock an open file; whether that was possible. A file system without locks never refuses."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_still_at(file: BufferedIOBase, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
