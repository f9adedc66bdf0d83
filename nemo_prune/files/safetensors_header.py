"""Safetensors files on disk: where each tensor is, without reading it."""

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from nemo_prune.errors import ModelError
from nemo_prune.files.pointers import refuse_pointer
from nemo_prune.files.untrusted import MAX_JSON_BYTES, parse_json

# As safetensors names them.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bits per value of every dtype that the format has.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_DIMENSIONS = 64
_METADATA = "__metadata__"
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype, shape, first byte and length in bytes in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file are.

    The header is checked as a whole: the tensors fill the file without a hole or an overlap, and each is as long
    as its dtype and shape say.

    Raises:
        ModelError: the header is damaged.
    """
    return _read(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises as :func:`read_header`."""
    return _read(path)[1]


def copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata; the tensors stay as they are, byte for byte.

    Raises:
        ModelError: the header is damaged.
        OSError: the copy can't be written.
    """
    read_header(source)
    with source.open("rb") as reader, target.open("wb") as writer:
        encoded = _header_with(reader, metadata)
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        shutil.copyfileobj(reader, writer, 1 << 20)


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put other metadata of the same length into a file, in place.

    Raises:
        ValueError: they are longer or shorter.
        OSError: the file can't be written.
    """
    with path.open("r+b") as file:
        encoded = _header_with(file, metadata)
        if more := 8 + len(encoded) - file.tell():
            raise ValueError(f"metadata of {path.name} take {more:+} bytes")
        file.seek(8)
        file.write(encoded)


def _header_with(file: BinaryIO, metadata: Mapping[str, str]) -> bytes:
    """The header of a file, which is read up to its data, with other metadata."""
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    header.pop(_METADATA, None)
    return encode_header({_METADATA: dict(metadata), **header})


def encode_header(header: Mapping[str, object]) -> bytes:
    """A header as it stands in a file, padded so that the data begin at a multiple of 8."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % _ALIGNMENT)


def _read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = path.stat().st_size
    refuse_pointer(path, path.name)
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_JSON_BYTES):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = _checked_metadata(header.pop(_METADATA, None))
        tensors = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
        _check_places(tensors, 8 + length, size)
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path.name} is not a valid safetensors file: {error}. Fetch it anew.") from error
    return tensors, metadata


def _checked_metadata(metadata: object) -> dict[str, str]:
    # As the official reader has it, null is none.
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    return metadata


def _stored(name: str, entry: object, begin: int) -> StoredTensor:
    """One entry of a header; offsets count from the byte after the header."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor `{name}` is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor `{name}` has the dtype {dtype!r}, expected one of {', '.join(_BITS)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor `{name}` has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor `{name}` has no valid offsets")
    length = offsets[1] - offsets[0]
    if 8 * length != _BITS[dtype] * prod(shape):
        raise ValueError(f"tensor `{name}` takes {length} bytes, which is not what {dtype} of shape {shape} takes")
    return StoredTensor(dtype, tuple(shape), begin + offsets[0], length)


def _are_counts(values: object) -> bool:
    # In Python a bool is an int; the format gives a number 64 bits.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**64 for value in values)


def _check_places(tensors: dict[str, StoredTensor], begin: int, end: int) -> None:
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.length)):
        if tensor.start != begin:
            raise ValueError("its tensors overlap or leave a hole")
        begin += tensor.length
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin}, the file has {end}")
