"""Write beside, then rename: what a run leaves is either the old folder or the whole new one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_prune.errors import OutputError


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that takes the place of ``out`` in one step when all went well, and else vanishes.

    Args:
        out: the target; what stands there stays until the new one is complete.
        overwrite: whether a target that is not empty may be replaced.

    Yields:
        An empty folder beside the target to write to.

    Raises:
        OutputError: the target is not empty, or its parent can't be written.
    """
    check_target(out, overwrite)
    staging, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    try:
        # What a killed run left behind.
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{out.parent} can't be written: {error}") from error
    try:
        yield staging
        _sync_files(staging)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(staging, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A file that takes the place of ``path`` in one step when all went well, and else vanishes.

    Yields:
        A path beside the target, this process's own, to write to.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new_file(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, and make the folder that it will lie in.

    Raises:
        OutputError: it exists and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Choose another --out, or replace it with --overwrite.")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)


def check_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a target that holds something, unless it may be replaced.

    Raises:
        OutputError: it is a file, or not empty, or not writable.
    """
    if out.is_file():
        raise OutputError(f"{out} is a file. Give a folder.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out} exists and is not empty. Choose another folder or use --overwrite.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable. Choose another folder.")


def _sync_files(folder: Path) -> None:
    """Bring the files to disk before the rename makes them look finished."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
