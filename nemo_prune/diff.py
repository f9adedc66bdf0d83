"""What differs between a base and a pruned folder: every file, every tensor, every row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nemo_prune.export import files_to_export
from nemo_prune.hashing import file_hash
from nemo_prune.mask import NeuronMask
from nemo_prune.stored import StoredTensor, read_header

# What a release adds to the base's files, and what it may write anew.
_OF_THE_RELEASE = ("README.md", "nemo_prune.json", "nemo_prune/")
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Difference:
    """One file or tensor that differs.

    Attributes:
        file: relative to the folders.
        what: ``left out`` of the base's, ``added``, ``changed`` as a whole, or ``rows`` of a tensor changed.
        tensor: its name, where a tensor differs.
        rows: the rows that differ.
        expected: whether a mask accounts for it: masked rows alone, or a file that belongs to a release.
    """

    file: str
    what: Literal["left out", "added", "changed", "rows"]
    tensor: str | None = None
    rows: tuple[int, ...] = ()
    expected: bool = False


def diff_folders(base: Path, out: Path, mask: NeuronMask | None = None) -> Iterator[Difference]:
    """Compare a pruned folder with its base; tensors are read in blocks and never held as a whole.

    Args:
        base: the unpruned diffusers folder.
        out: the pruned one.
        mask: rows that may differ; none may without it.

    Yields:
        What differs, file by file.

    Raises:
        ModelError: a safetensors file of either is damaged.
    """
    copied, left_out = (set(map(Path.as_posix, paths)) for paths in files_to_export(base))
    ours = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    for name in sorted(copied | left_out | ours):
        if name not in ours:
            yield Difference(name, "left out", expected=name in left_out)
        elif name.startswith(_OF_THE_RELEASE):
            yield Difference(name, "added", expected=True)
        elif name not in copied:
            yield Difference(name, "added")
        elif name.endswith(".safetensors"):
            yield from _diff_tensors(base / name, out / name, name, mask)
        elif file_hash(base / name) != file_hash(out / name):
            yield Difference(name, "changed")


def _diff_tensors(base: Path, out: Path, name: str, mask: NeuronMask | None) -> Iterator[Difference]:
    before, after = read_header(base), read_header(out)
    if before != after or _header_bytes(base, before) != _header_bytes(out, after):
        yield Difference(name, "changed")
        return
    masked = mask.tensor_rows if mask and name.startswith("unet/") else {}
    for tensor, stored in before.items():
        rows = _differing_rows(base, out, stored)
        if rows:
            yield Difference(name, "rows", tensor, rows, expected=set(rows) <= set(masked.get(tensor, ())))


def _header_bytes(path: Path, tensors: Mapping[str, StoredTensor]) -> bytes:
    """Everything before the first tensor's first byte."""
    first = min((tensor.start for tensor in tensors.values()), default=path.stat().st_size)
    with path.open("rb") as file:
        return file.read(first)


def _differing_rows(base: Path, out: Path, stored: StoredTensor) -> tuple[int, ...]:
    """Rows of a tensor whose bytes differ; a tensor without rows counts as one."""
    num_rows = stored.shape[0] if stored.shape and stored.shape[0] else 1
    row_bytes = stored.length // num_rows
    if not row_bytes:
        return ()
    rows_at_once = max(1, _BLOCK_BYTES // row_bytes)
    found: list[int] = []
    with base.open("rb") as first, out.open("rb") as second:
        first.seek(stored.start)
        second.seek(stored.start)
        for start in range(0, num_rows, rows_at_once):
            size = min(rows_at_once, num_rows - start) * row_bytes
            before, after = first.read(size), second.read(size)
            if before != after:
                pair = (np.frombuffer(block, dtype=np.uint8).reshape(-1, row_bytes) for block in (before, after))
                differs = np.not_equal(*pair).any(axis=1)
                found += (np.flatnonzero(differs) + start).tolist()
    return tuple(found)
