"""Single-file checkpoints of SD 1.x: read, patched in place, made from a folder and compared with one.

**Moving averages.** A single file of a training run holds the U-Net twice: the plain weights, and their moving
average (EMA) under ``model_ema.``. Every copy of a masked layer is pruned, in both. What is measured is the plain
weights, as diffusers loads them. A conversion leaves the averages out, and the record says so.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_prune.checkpoint.folder import CheckpointFiles
from nemo_prune.checkpoint.ldm_names import EMA_PREFIX, PREFIXES, ema_name, full_name, layer_names, ldm_names, ldm_shape
from nemo_prune.checkpoint.pickled import read_pickled
from nemo_prune.checkpoint.rows import change_behind, check_rows, scale_rows, with_changes_behind, with_scaled_rows
from nemo_prune.checkpoint.tensors import (
    FORMAT_ONLY,
    TensorBytes,
    equal_bytes,
    loaded_tensor,
    stored_tensor,
    write_tensors,
)
from nemo_prune.checkpoint.weights import safetensors_of
from nemo_prune.errors import MaskError, OutputError
from nemo_prune.files.layout import SAFETENSORS, has_ending
from nemo_prune.files.mask_tensors import METADATA_KEY
from nemo_prune.files.pointers import refuse_pointer
from nemo_prune.files.safetensors_header import read_header
from nemo_prune.mask import NeuronMask, Pruning, bias_behind, tensor_names, weight_behind

SUFFIXES = (SAFETENSORS, ".ckpt")


@dataclass(frozen=True)
class FolderTensor:
    """A tensor of a diffusers folder: the file, relative to it, the name in that file, and the content."""

    file: str
    name: str
    content: TensorBytes


@dataclass(frozen=True)
class StoredWeights:
    """What a file of weights holds.

    Attributes:
        tensors: by name; none is read yet.
        wrapper: the key that a training state has them under; None where they are the file's own content.
        others: further sets of tensors -> how many, which are left out.
    """

    tensors: dict[str, TensorBytes]
    wrapper: str | None = None
    others: Mapping[str, int] = field(default_factory=dict)


def is_single_file(path: Path) -> bool:
    """Whether a name is that of a checkpoint in one file, in upper or lower case."""
    return has_ending(path, *SUFFIXES)


def read_weights(file: Path) -> StoredWeights:
    """The tensors of a file, and where in it they are.

    Args:
        file: .safetensors, or one that torch saved.

    Raises:
        ModelError: it is damaged, a Git LFS pointer, or a pickle that wants more than tensors.
    """
    refuse_pointer(file, file.name)
    if has_ending(file, SAFETENSORS):
        return StoredWeights({name: stored_tensor(file, stored) for name, stored in read_header(file).items()})
    pickled = read_pickled(file)
    tensors = {name: loaded_tensor(name, tensor) for name, tensor in pickled.tensors.items()}
    return StoredWeights(tensors, pickled.wrapper, pickled.others)


def read_tensors(file: Path) -> dict[str, TensorBytes]:
    """The tensors of a file, by name; see :func:`read_weights`."""
    return read_weights(file).tensors


def folder_tensors(files: CheckpointFiles, variant: str | None) -> dict[str, FolderTensor]:
    """The content of a single file made from a diffusers folder: name in the single file -> tensor.

    Raises:
        ModelError: the folder has a tensor that has no place in a single file, or lacks weights.
    """
    found = {}
    for component in PREFIXES:
        here: dict[str, FolderTensor] = {}
        for path in safetensors_of(files, component, variant):
            for name, content in read_tensors(files.folder / path).items():
                here[name] = FolderTensor(path.as_posix(), name, content)
        for name, ldm_name in ldm_names(component, here).items():
            shape = ldm_shape(ldm_name, here[name].content.shape)
            found[ldm_name] = replace(here[name], content=replace(here[name].content, shape=shape))
    return found


def masked_tensors(mask: NeuronMask, names: Collection[str]) -> dict[str, str]:
    """Every copy of the tensors that a mask touches, in a single file with these names.

    Returns:
        Name in the file, of the plain weights or their average -> name in a diffusers folder.
    """
    plain = layer_names(mask.touched, names)
    copies = {ldm_name: name for name, ldm_name in plain.items()}
    copies |= {ema_name(ldm_name): name for name, ldm_name in plain.items()}
    return {copy: name for copy, name in copies.items() if copy in names}


def patch_single_file(file: Path, pruning: Pruning) -> tuple[int, int]:
    """Prune every copy of the masked tensors in a .safetensors file, in place.

    Returns:
        Rows changed, and how many of them are of moving averages.

    Raises:
        MaskError: a masked tensor is not in the file or has another number of rows.
        ModelError: the file is damaged.
    """
    stored, pruned = read_header(file), pruning.mask.tensor_rows
    copies = masked_tensors(pruning.mask, stored)
    for layer in pruning.mask.layers:
        needed = pruning.mask.touched & {tensor_names(layer)[0], bias_behind(layer), weight_behind(layer)}
        if not needed <= set(copies.values()):
            raise MaskError(f"Mask layer `{layer}` is not in the single file. Is it another model's?")
    for copy, name in copies.items():
        check_rows(f"{file.name} (`{copy}`)", {name: stored[copy]}, pruning.mask)
    rows = {copy: pruned[name] for copy, name in copies.items() if name in pruned}
    averages = sum(len(indices) for copy, indices in rows.items() if copy.startswith(EMA_PREFIX))
    change_behind(file, stored, copies, pruning.mask)
    return scale_rows(file, stored, rows, pruning.scale), averages


def written_metadata(kept: Mapping[str, str], base_sha256: str, pruning: Pruning) -> dict[str, str]:
    """The metadata of a pruned single file: the base's, and what was done to it as one JSON string under one key.

    Args:
        kept: of the base's, see :mod:`nemo_prune.checkpoint.privacy`.
        base_sha256: of the base.
        pruning: what was done.
    """
    done = {"base_sha256": base_sha256, "mask_digest": pruning.mask.digest, "scale": pruning.scale}
    return {**kept, METADATA_KEY: json.dumps(done, sort_keys=True)}


def write_single_file(
    files: CheckpointFiles, variant: str | None, out: Path, metadata: Mapping[str, str] = FORMAT_ONLY
) -> None:
    """Write the weights of a diffusers folder as one file, with the names of single files.

    Args:
        files: of the diffusers folder.
        variant: of its weights.
        out: the file to write.
        metadata: of the file.

    Raises:
        ModelError: the folder has a tensor that has no place in a single file.
        OSError: the file can't be written.
    """
    write_tensors(out, {name: tensor.content for name, tensor in folder_tensors(files, variant).items()}, metadata)


def check_single_file(file: Path, files: CheckpointFiles, variant: str | None, pruning: Pruning | None = None) -> None:
    """Make sure that a single file holds every tensor of a folder, byte for byte, but for what was pruned.

    Args:
        file: the single file.
        files: of the folder.
        variant: weights variant of the folder.
        pruning: what was done to the file and not to the folder; None where they are the same.

    Raises:
        OutputError: one is missing or differs.
    """
    written = {full_name(name): stored_tensor(file, each) for name, each in read_header(file).items()}
    tensors = folder_tensors(files, variant)
    rows = pruning.mask.tensor_rows if pruning else {}
    masked = masked_tensors(pruning.mask, tensors) if pruning else {}
    for name, tensor in tensors.items():
        expected, touched = tensor.content, masked.get(name, "")
        if rows.get(touched):
            expected = with_scaled_rows(expected, rows[touched], pruning.scale)
        elif pruning and touched in pruning.mask.behind:
            expected = with_changes_behind(expected, touched, pruning.mask)
        if name not in written or not equal_bytes(expected, written[name]):
            raise OutputError(
                f"The single file was not written correctly: `{name}` is not what the pruned folder holds. Is the "
                "disk damaged, or was the model changed meanwhile? Run the same command again."
            )
