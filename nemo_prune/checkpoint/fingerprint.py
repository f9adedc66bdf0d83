"""Digests of the tensors that a mask touches: which base it was made for, and what pruning leaves of them."""

from hashlib import sha256
from pathlib import Path

import torch

from nemo_prune.checkpoint.folder import CheckpointFiles, scan_folder
from nemo_prune.checkpoint.single_file import masked_tensors, read_tensors
from nemo_prune.checkpoint.tensors import tensor_digest
from nemo_prune.errors import MaskError
from nemo_prune.facts import Digests
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, StoredTensor, read_header
from nemo_prune.mask import NeuronMask

# A base may be published in any of these.
_ALSO_AS = ("F16", "BF16")


def tensor_digests(base: CheckpointFiles, mask: NeuronMask) -> Digests:
    """Digests of the tensors of a base that a mask touches.

    Args:
        base: the files of the unpruned model; shards and variants count.
        mask: layers without a pruned neuron are left out.

    Returns:
        Tensor name -> ``DTYPE:sha256`` of its bytes as stored and as cast to float16 and bfloat16, sorted.
    """
    touched = mask.touched
    digests: dict[str, set[str]] = {}
    for path in base.unet_weights:
        for name, stored in read_header(base.folder / path).items():
            if name in touched and stored.dtype in FLOAT_DTYPES and stored.length:
                digests.setdefault(name, set()).update(_digests(base.folder / path, stored))
    return {name: tuple(sorted(digests[name])) for name in sorted(digests)}


def pruned_digests(out: Path, mask: NeuronMask) -> Digests:
    """Digests of what pruning left behind the attention.

    Args:
        out: the pruned diffusers folder, or single file.
        mask: what was pruned.

    Returns:
        Name in a diffusers folder -> ``DTYPE:sha256`` of every copy as stored: shards, variants and averages count.
    """
    files = [out] if out.is_file() else [out / path for path in scan_folder(out).unet_weights]
    found: dict[str, set[str]] = {}
    for file in files:
        tensors = read_tensors(file)
        names = masked_tensors(mask, tensors) if out.is_file() else {name: name for name in tensors}
        for copy, name in names.items():
            if name in mask.behind:
                found.setdefault(name, set()).add(tensor_digest(tensors[copy]))
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def check_base(found: Digests, recorded: Digests) -> None:
    """Refuse a base whose tensors are not those that a mask was made for.

    Args:
        found: of the base.
        recorded: of the mask; any common digest of a tensor is enough.

    Raises:
        MaskError: a tensor differs, or nothing is recorded.
    """
    if not recorded:
        raise MaskError(
            "The mask does not say which base tensors it was made for, so it can't be checked. Use --force if "
            "you know that it belongs to this model."
        )
    differing = [name for name in recorded if not set(recorded[name]) & set(found.get(name, ()))]
    if differing:
        raise MaskError(
            f"The mask was made for another base: {len(differing)} of {len(recorded)} tensors differ, the first is "
            f"`{differing[0]}`. Give the base that its metadata names (`nemo-prune inspect`), or --force to prune a "
            "relative of it, such as a fine-tune."
        )


def _digests(path: Path, stored: StoredTensor) -> list[str]:
    with path.open("rb") as file:
        file.seek(stored.start)
        content = bytearray(file.read(stored.length))
    values = torch.frombuffer(content, dtype=FLOAT_DTYPES[stored.dtype])
    digests = {f"{stored.dtype}:{sha256(content).hexdigest()}"}
    for dtype in _ALSO_AS:
        cast = values.to(FLOAT_DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
        digests.add(f"{dtype}:{sha256(cast).hexdigest()}")
    return sorted(digests)
