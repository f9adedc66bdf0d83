"""Write beside, then rename: what a run leaves is either the old folder or the whole new one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nemo_prune.errors import OutputError
from nemo_prune.files.locks import sole_lock


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that replaces ``out`` in one step if all went well, and is removed otherwise.

    An old folder is moved aside first, because a rename cannot replace a folder that is not empty. A kill between
    the two renames leaves no ``out``; the old folder is restored when the next one is staged for it.

    Args:
        out: the target; what is there stays until the new one is complete.
        overwrite: whether a target that is not empty may be replaced.

    Yields:
        An empty folder beside the target to write to.

    Raises:
        OutputError: the target is not empty, can't be written, or is written by another process.
    """
    check_target(out, overwrite)
    # A link stays a link: its target is replaced.
    out = Path(os.path.realpath(out))
    staging, old = _beside(out, "partial"), _beside(out, "old")
    busy = OutputError(f"Another process writes {out}. Wait until it is done, or choose another --out.")
    with writing(out), sole_lock(_beside(out, "lock"), busy):
        _remove(staging)
        if old.exists() and not out.exists():
            os.replace(old, out)
            check_target(out, overwrite)
        _remove(old)
        staging.mkdir()
        try:
            yield staging
            _sync_all(staging)
            if out.exists():
                os.replace(out, old)
            try:
                os.replace(staging, out)
            except BaseException:
                if old.exists():
                    os.replace(old, out)
                raise
            sync(out.parent)
            if old.exists():
                # Under its own name it must never be half removed, because that name is restored.
                os.replace(old, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A file that replaces ``path`` in one step if all went well, and is removed otherwise.

    Yields:
        A path beside the target, used by this process alone, to write to.

    Raises:
        OutputError: it can't be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn the system's errors while writing into named ones: a full disk, a missing permission.

    Raises:
        OutputError: instead of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{out} can't be written: {error}. Make room, correct the permissions, or choose another place."
        ) from error


def check_new_file(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, and create its folder.

    Raises:
        OutputError: it exists and may not be replaced.
    """
    with writing(path):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists. Choose another --out, or replace it with --overwrite.")
        path.absolute().parent.mkdir(parents=True, exist_ok=True)


def check_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a target that holds something, unless it may be replaced.

    Raises:
        OutputError: it is a file, or not empty, or not writable.
    """
    real = Path(os.path.realpath(out))
    with writing(out):
        if real.exists() and not real.is_dir():
            raise OutputError(f"{out} is a file. Give a folder.")
        if os.path.ismount(real):
            raise OutputError(f"{out} is mounted, so no folder can replace it. Give a folder inside it.")
        if real.exists() and any(real.iterdir()) and not overwrite:
            raise OutputError(f"{out} exists and is not empty. Choose another folder or use --overwrite.")
        parent = _existing_parent(real)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"{parent} is not writable. Choose another folder.")


def check_release_target(out: Path, base: Path, size: int, overwrite: bool = False) -> None:
    """Refuse a target that :func:`check_target` refuses, that would replace the model, or that lacks room for it.

    Args:
        out: the folder of the pruned model.
        base: the unpruned model.
        size: bytes that will be written.
        overwrite: whether a target that is not empty may be replaced.

    Raises:
        OutputError: nothing was written.
    """
    check_target(out, overwrite)
    real, base = Path(os.path.realpath(out)), Path(os.path.realpath(base))
    if real.is_relative_to(base):
        raise OutputError(f"{out} is inside the model's own folder. Choose another --out.")
    if base.is_relative_to(real):
        raise OutputError(f"The model {base} is inside {out}, which would be replaced. Choose another --out.")
    parent = _existing_parent(real)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OutputError(
            f"{parent} has {free / 1e9:.1f} GB free, the pruned model takes {size / 1e9:.1f} GB. Make room or "
            "choose another --out."
        )


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


def _existing_parent(out: Path) -> Path:
    return next(folder for folder in out.parents if folder.exists())


def _remove(path: Path) -> None:
    """Remove what a killed process left, folder or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(folder: Path) -> None:
    """Bring files and the folders' entries to disk before the rename makes them look finished."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
