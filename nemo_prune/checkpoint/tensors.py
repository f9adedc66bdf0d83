"""Tensors whose bytes are read on demand, and safetensors files written from them."""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import torch

from nemo_prune.errors import ModelError
from nemo_prune.files.safetensors_header import StoredTensor, encode_header

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FORMAT_ONLY: Mapping[str, str] = {"format": "pt"}
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorBytes:
    """A tensor whose content is stored somewhere.

    Attributes:
        dtype: as safetensors names it.
        shape: its dimensions.
        length: its size in bytes.
        blocks: size in bytes -> the content in blocks of that size, the last one shorter.
    """

    dtype: str
    shape: tuple[int, ...]
    length: int
    blocks: Callable[[int], Iterator[bytes]]


def stored_tensor(path: Path, stored: StoredTensor) -> TensorBytes:
    """A tensor of a safetensors file."""

    def blocks(size: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, stored.length, size):
                yield file.read(min(size, stored.length - start))

    return TensorBytes(stored.dtype, stored.shape, stored.length, blocks)


def loaded_tensor(name: str, tensor: torch.Tensor) -> TensorBytes:
    """A tensor in memory, or mapped into it.

    Raises:
        ModelError: safetensors have no such dtype, or the tensor is incomplete.
    """
    is_dense = tensor.layout == torch.strided and not tensor.is_meta
    if not is_dense or tensor.dtype not in _DTYPES:
        raise ModelError(
            f"`{name}` is a tensor of {tensor.dtype} that safetensors do not hold as it is. Use the float32, float16 "
            "or bfloat16 weights."
        )
    # A few bytes can claim any number of elements.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ModelError(
            f"`{name}` claims {tensor.numel()} elements that the file does not hold. Fetch the file again."
        )
    shape = tuple(tensor.shape)

    def blocks(size: int) -> Iterator[bytes]:
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, len(content), size):
            yield content[start : start + size].tobytes()

    return TensorBytes(_DTYPES[tensor.dtype], shape, prod(shape) * tensor.element_size(), blocks)


def equal_bytes(first: TensorBytes, second: TensorBytes) -> bool:
    """Whether two tensors have the same dtype and the same bytes, in whatever shape."""
    if (first.dtype, first.length) != (second.dtype, second.length):
        return False
    pairs = zip(first.blocks(_BLOCK_BYTES), second.blocks(_BLOCK_BYTES), strict=True)
    return all(before == after for before, after in pairs)


def tensor_digest(tensor: TensorBytes) -> str:
    """``DTYPE:sha256`` of a tensor's bytes."""
    digest = sha256()
    for block in tensor.blocks(_BLOCK_BYTES):
        digest.update(block)
    return f"{tensor.dtype}:{digest.hexdigest()}"


def differing_rows(first: TensorBytes, second: TensorBytes) -> tuple[int, ...]:
    """Rows whose bytes differ, of two tensors of equal length; a tensor without rows counts as one row."""
    num_rows = first.shape[0] if first.shape and first.shape[0] else 1
    row_bytes = first.length // num_rows
    if not row_bytes:
        return ()
    rows_at_once = max(1, _BLOCK_BYTES // row_bytes)
    found: list[int] = []
    pairs = zip(*(each.blocks(rows_at_once * row_bytes) for each in (first, second)), strict=True)
    for place, (before, after) in enumerate(pairs):
        if before != after:
            rows = (np.frombuffer(block, dtype=np.uint8).reshape(-1, row_bytes) for block in (before, after))
            differs = np.not_equal(*rows).any(axis=1)
            found += (np.flatnonzero(differs) + place * rows_at_once).tolist()
    return tuple(found)


def write_tensors(path: Path, tensors: Mapping[str, TensorBytes], metadata: Mapping[str, str] = FORMAT_ONLY) -> None:
    """Write a safetensors file block by block; the same tensors give the same bytes.

    Args:
        path: the file.
        tensors: by their names.
        metadata: of the file.

    Raises:
        OSError: it can't be written.
    """
    # Wide elements first keep every tensor at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].length // max(prod(tensors[name].shape), 1), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.length
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = encode_header(header)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            for block in tensors[name].blocks(_BLOCK_BYTES):
                file.write(block)
