"""The tensors and the metadata of a mask file, which may be anybody's."""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_prune.files.safetensors_header import read_header
from nemo_prune.files.untrusted import parse_json

# Version 2 has shifts of biases beside the rows, version 3 combinations of kept neurons, too.
FORMAT_VERSIONS = (1, 2, 3)
METADATA_KEY = "nemo_prune"
# A mask of SD 1.x with everything in it takes a third of this.
_MAX_BYTES = 64 << 20


def read_mask_tensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors; masks are bits or refused.

    Raises:
        ModelError: it is not a safetensors file.
        ValueError: it is none of a mask.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, a mask has {_MAX_BYTES >> 20} megabytes at most")
    stored = read_header(path)
    with safe_open(path, framework="pt") as file:
        metadata = parse_json((file.metadata() or {}).get(METADATA_KEY, "{}").encode())
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are not a JSON object")
        if type(version := metadata.get("format_version")) is not int or version not in FORMAT_VERSIONS:
            raise ValueError(
                f"it has format {version!r}, this version reads {FORMAT_VERSIONS[-1]} and older ones. Is it a mask, "
                "and made by a newer nemo-prune?"
            )
        expected = {"BOOL"} if version == FORMAT_VERSIONS[0] else {"BOOL", "F32"}
        if other := {tensor.dtype for tensor in stored.values()} - expected:
            raise ValueError(f"it holds {', '.join(sorted(other))}, expected BOOL, where True means pruned")
        tensors = {name: file.get_tensor(name) for name in stored}
    if any((tensor.view(torch.uint8) > 1).any() for tensor in tensors.values() if tensor.dtype == torch.bool):
        raise ValueError("it holds bytes that are neither 0 nor 1")
    return metadata, tensors


def layers_in_order(metadata: dict, found: Collection[str]) -> list[str]:
    """The layers in the order of execution, which is saved beside them: the header lists them by name.

    Raises:
        ValueError: the metadata name other layers.
    """
    names = metadata.get("layers", sorted(found))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("`layers` of its metadata are not names")
    if sorted(names) != sorted(found):
        raise ValueError("`layers` of its metadata are not those that it holds")
    return names
