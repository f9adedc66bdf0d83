"""Rows of the tensors of a safetensors file: whether they can be changed, and changing them in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nemo_prune.errors import MaskError, ModelError
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, StoredTensor
from nemo_prune.mask import NeuronMask, tensor_names


def check_rows(file: str, tensors: Mapping[str, StoredTensor], mask: NeuronMask) -> None:
    """Refuse tensors whose rows do not fit a mask or can't be changed.

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
