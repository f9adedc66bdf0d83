"""Safetensors files as they lie on disk: where each tensor is, without reading it."""

import json
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from nemo_prune.errors import ModelError

# As safetensors names them.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 100_000_000
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype, shape, first byte and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie.

    Raises:
        ModelError: the header is damaged or points past the end of the file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(f"tensor `{name}` lies outside the file")
            shape = tuple(entry["shape"])
            tensors[name] = StoredTensor(entry["dtype"], shape, 8 + length + first, last - first)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path.name} is no valid safetensors file: {error}. Fetch it anew.") from error
    return tensors


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
