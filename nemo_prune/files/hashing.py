"""sha256 of files, without loading anything heavy."""

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
