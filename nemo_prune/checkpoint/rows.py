"""Rows, and what is behind them, in a safetensors file: whether they can be changed, and changing them in place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nemo_prune.checkpoint.tensors import TensorBytes, stored_tensor
from nemo_prune.errors import MaskError, ModelError
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, StoredTensor
from nemo_prune.mask import NeuronMask, tensor_names


def check_rows(file: str, tensors: Mapping[str, StoredTensor], mask: NeuronMask) -> None:
    """Refuse tensors that do not fit a mask or can't be changed.

    Args:
        file: its name, for the messages.
        tensors: name, as in a diffusers folder -> where it is in the file; missing layers are skipped.
        mask: what to prune.

    Raises:
        MaskError: a tensor has another number of rows.
        ModelError: it is quantised.
    """
    for layer, pruned in mask.layers.items():
        for name in set(tensor_names(layer)) & tensors.keys():
            tensor = tensors[name]
            if tensor.shape[:1] != (len(pruned),):
                raise MaskError(
                    f"Mask layer `{layer}` has {len(pruned)} neurons, {file} has {list(tensor.shape)} there. "
                    "Was the mask made for another model?"
                )
            if tensor.dtype not in FLOAT_DTYPES:
                raise ModelError(
                    f"`{layer}` is stored as {tensor.dtype} in {file}; rows of quantised weights can't be zeroed "
                    "exactly. Use the float32, float16 or bfloat16 weights."
                )
    for name in mask.behind & tensors.keys():
        if not mask.fits_behind(name, tensors[name].shape) or tensors[name].dtype not in FLOAT_DTYPES:
            raise MaskError(
                f"The mask does not fit `{name}`, which {file} has as {tensors[name].dtype} "
                f"{list(tensors[name].shape)}. Was the mask made for another model?"
            )


def with_scaled_rows(tensor: TensorBytes, rows: Sequence[int], scale: float) -> TensorBytes:
    """A tensor as it is when some of its rows are multiplied by a number; it is read at once.

    Args:
        tensor: of a float dtype.
        rows: which.
        scale: the factor.
    """

    def blocks(size: int) -> Iterator[bytes]:
        content = bytearray(b"".join(tensor.blocks(size)))
        values = torch.frombuffer(content, dtype=FLOAT_DTYPES[tensor.dtype]).reshape(tensor.shape[0], -1)
        chosen = list(rows)
        values[chosen] = (values[chosen].double() * scale).to(values.dtype) if scale else 0
        for start in range(0, len(content), size):
            yield bytes(content[start : start + size])

    return replace(tensor, blocks=blocks)


def with_changes_behind(tensor: TensorBytes, name: str, mask: NeuronMask) -> TensorBytes:
    """A bias or a weight behind the attention as a mask leaves it; it is read at once.

    Args:
        tensor: the base's.
        name: of it in a diffusers folder, one that the mask changes.
        mask: what is pruned.
    """

    def blocks(size: int) -> Iterator[bytes]:
        content = bytearray(b"".join(tensor.blocks(size)))
        values = torch.frombuffer(content, dtype=FLOAT_DTYPES[tensor.dtype]).reshape(tensor.shape)
        changed = mask.changed_behind(name, values).flatten().view(torch.uint8).numpy().tobytes()
        for start in range(0, len(changed), size):
            yield changed[start : start + size]

    return replace(tensor, blocks=blocks)


def change_behind(path: Path, tensors: Mapping[str, StoredTensor], names: Mapping[str, str], mask: NeuronMask) -> None:
    """Change what is behind the attention in place.

    Args:
        path: the file.
        tensors: where its tensors are.
        names: of a tensor in the file -> in a diffusers folder; those that the mask does not change are skipped.
        mask: what is pruned.
    """
    behind = mask.behind
    with path.open("r+b") as file:
        for there in (there for there, name in names.items() if name in behind):
            changed = with_changes_behind(stored_tensor(path, tensors[there]), names[there], mask)
            content = b"".join(changed.blocks(changed.length))
            file.seek(tensors[there].start)
            file.write(content)


def scale_rows(path: Path, tensors: Mapping[str, StoredTensor], rows: Mapping[str, Sequence[int]], scale: float) -> int:
    """Multiply rows in place and return their number; zero is all zero bits in every float format.

    Args:
        path: the file.
        tensors: where its tensors are.
        rows: name of a tensor -> its rows to change; missing tensors are skipped.
        scale: the factor.
    """
    here = {name: indices for name, indices in rows.items() if name in tensors}
    with path.open("r+b") as file:
        for name, indices in here.items():
            row_bytes = tensors[name].length // tensors[name].shape[0]
            dtype = FLOAT_DTYPES[tensors[name].dtype]
            for index in indices:
                place = tensors[name].start + index * row_bytes
                scaled = bytes(row_bytes)
                if scale:
                    file.seek(place)
                    row = torch.frombuffer(bytearray(file.read(row_bytes)), dtype=dtype)
                    scaled = (row.double() * scale).to(dtype).view(torch.uint8).numpy().tobytes()
                file.seek(place)
                file.write(scaled)
    return sum(len(indices) for indices in here.values())
