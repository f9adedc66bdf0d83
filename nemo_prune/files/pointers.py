"""Git LFS pointers: small texts that stand where a large file was not fetched."""

from pathlib import Path

from nemo_prune.errors import ModelError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1024


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS instead of its content."""
    if path.stat().st_size > _MOST_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def refuse_pointer(path: Path, name: str) -> None:
    """Refuse a file that is a pointer of Git LFS.

    Args:
        path: the file.
        name: what to call it.

    Raises:
        ModelError: it is one.
    """
    if is_pointer(path):
        raise ModelError(
            f"{name} is a Git LFS pointer: the file itself was not fetched. Run `git lfs pull` in the model's folder, "
            "or download the model with `hf download`."
        )
