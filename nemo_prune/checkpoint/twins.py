"""Whether the base's masked rows are anywhere in a release: in a backup, an archive, another average."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nemo_prune.checkpoint.folder import CheckpointFiles
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, read_header
from nemo_prune.mask import NeuronMask

# A row of values is told from all others by its first so many bytes.
_PATTERN_BYTES = 48
_BLOCK_BYTES = 16 << 20
# A twin holds all rows, so that a few of them find it in a large file.
_SMALL_FILE, _MIDDLE_FILE = 16 << 20, 256 << 20
_ROWS_OF_A_MIDDLE_FILE, _ROWS_OF_A_LARGE_FILE = 16, 4


def base_rows(base: CheckpointFiles, mask: NeuronMask) -> list[tuple[bytes, ...]]:
    """The beginnings of the masked rows of a base, each as stored and in the other precisions that people save in.

    Args:
        base: the files of the unpruned model.
        mask: what is pruned.
    """
    masked, patterns = mask.tensor_rows, []
    for path in base.unet_weights:
        with (base.folder / path).open("rb") as file:
            for name, stored in read_header(base.folder / path).items():
                if len(stored.shape) != 2 or stored.dtype not in FLOAT_DTYPES:
                    continue
                row_bytes = stored.length // stored.shape[0]
                for row in masked.get(name, ()):
                    file.seek(stored.start + row * row_bytes)
                    patterns.append(_forms(file.read(row_bytes), FLOAT_DTYPES[stored.dtype]))
    return [forms for forms in patterns if forms]


def files_with_rows(folder: Path, rows: Sequence[tuple[bytes, ...]]) -> Iterator[Path]:
    """The files of a folder that hold one of some rows, relative to it.

    Args:
        folder: a release.
        rows: see :func:`base_rows`.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _holds_any(path, rows):
            yield path.relative_to(folder)


def _forms(row: bytes, dtype: torch.dtype) -> tuple[bytes, ...]:
    """A row's beginning as stored and in other precisions; rows that are constant could be anything."""
    values = torch.frombuffer(bytearray(row), dtype=dtype)
    if not values.isfinite().all() or values.unique().numel() < 8:
        return ()
    casts = (values.to(other).view(torch.uint8).numpy().tobytes() for other in FLOAT_DTYPES.values())
    return tuple(cast[:_PATTERN_BYTES] for cast in casts)


def _holds_any(path: Path, rows: Sequence[tuple[bytes, ...]]) -> bool:
    size = path.stat().st_size
    if size > _SMALL_FILE:
        number = _ROWS_OF_A_MIDDLE_FILE if size <= _MIDDLE_FILE else _ROWS_OF_A_LARGE_FILE
        rows = rows[:: max(1, len(rows) // number)]
    with path.open("rb") as file:
        end = b""
        while block := file.read(_BLOCK_BYTES):
            content = end + block
            if any(form in content for forms in rows for form in forms):
                return True
            end = content[-_PATTERN_BYTES:]
    return False
