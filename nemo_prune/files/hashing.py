"""sha256 of files and texts, without loading anything heavy."""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

_BLOCK = 1 << 20


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_hash(texts: Iterable[str]) -> str:
    """sha256 of texts in their order."""
    return sha256("\0".join(texts).encode()).hexdigest()
