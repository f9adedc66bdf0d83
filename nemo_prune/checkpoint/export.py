"""Copy a checkpoint and prune the copy; nothing else changes but what must not be published."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from nemo_prune.checkpoint.folder import CheckpointFiles, scan_folder
from nemo_prune.checkpoint.parts import publicly_named
from nemo_prune.checkpoint.privacy import cleaned_config, cleaned_metadata, write_config
from nemo_prune.checkpoint.rows import change_behind, check_rows, scale_rows
from nemo_prune.errors import MaskError, OutputError
from nemo_prune.facts import ExportReport
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import SAFETENSORS
from nemo_prune.files.safetensors_header import StoredTensor, copy_with_metadata, read_header, read_metadata
from nemo_prune.mask import NeuronMask, Pruning, tensor_names


def export_checkpoint(base: Path, mask: NeuronMask, out: Path, scale: float = 0.0) -> ExportReport:
    """Copy a diffusers folder file by file, zero the masked rows of the U-Net in the copy and change what is behind.

    Every safetensors file of the U-Net that holds a masked layer or what is behind one is patched: shards, and variants
    such as fp16. Files are copied with their content, even if the base holds links.

    Args:
        base: the folder of the unpruned model; it is only read.
        mask: what to prune.
        out: an existing, empty folder.
        scale: what the masked rows are multiplied by; the paper tries -1 to 0.75.

    Raises:
        ModelError: the U-Net has no safetensors weights, or a file is damaged.
        MaskError: a masked layer is not in the weights or has another number of rows.
        OutputError: the copy can't be written.
    """
    return export_files(scan_folder(base), Pruning(mask, scale), out)


def export_files(files: CheckpointFiles, pruning: Pruning, out: Path, hashed: bool = True) -> ExportReport:
    """Copy and prune a folder that was looked through already, see :func:`export_checkpoint`.

    Args:
        files: of the unpruned model.
        pruning: the mask, and what its rows are multiplied by.
        out: an existing, empty folder.
        hashed: whether the report has sha256, which takes most of the time.
    """
    rows = pruning.mask.tensor_rows
    headers = {path: read_header(files.folder / path) for path in files.unet_weights}
    _check_layers(pruning.mask, headers)
    after, before, changed, dropped = {}, {}, {}, {}
    try:
        for path in files.kept:
            target, name = out / path, path.as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            is_pruned = not pruning.mask.touched.isdisjoint(headers.get(path, {}))
            before[name], gone = copy_published(files.folder, path, target, is_pruned, hashed)
            if gone:
                dropped[name] = gone
            if is_pruned:
                stored = read_header(target)
                changed[name] = scale_rows(target, stored, rows, pruning.scale)
                change_behind(target, stored, {name: name for name in stored}, pruning.mask)
            after[name] = file_hash(target) if hashed and (gone or is_pruned) else before[name]
    except OSError as error:
        raise OutputError(f"The pruned model can't be written to {out}: {error}") from error
    others = {name: digest for name, digest in before.items() if name in changed or name in dropped}
    left_out = publicly_named(files.left_out)
    return ExportReport(after if hashed else {}, others if hashed else {}, changed, left_out, dropped)


def copy_published(
    folder: Path, path: Path, target: Path, is_pruned: bool, hashed: bool = True
) -> tuple[str, tuple[str, ...]]:
    """Copy a file without what must not be published.

    Args:
        folder: the model's.
        path: of the file, relative to it.
        target: the copy.
        is_pruned: whether rows of it will be changed.
        hashed: whether the sha256 is asked for.

    Returns:
        sha256 of the base's file, and the keys that the copy does not have.
    """
    source = folder / path
    if path.suffix == SAFETENSORS:
        metadata, dropped = cleaned_metadata(read_metadata(source), is_pruned)
        if dropped:
            copy_with_metadata(source, target, metadata)
            return file_hash(source) if hashed else "", dropped
    elif cleaned := cleaned_config(folder, path):
        write_config(target, cleaned[0])
        return file_hash(source) if hashed else "", cleaned[1]
    return copy_file(source, target, hashed), ()


def copy_file(source: Path, target: Path, hashed: bool = True) -> str:
    """Copy a file's content, never its link, and return the content's sha256, or nothing unless asked for."""
    digest = sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            if hashed:
                digest.update(block)
            writer.write(block)
    return digest.hexdigest() if hashed else ""


def _check_layers(mask: NeuronMask, headers: Mapping[Path, Mapping[str, StoredTensor]]) -> None:
    for layer in mask.layers:
        if not any(tensor_names(layer)[0] in tensors for tensors in headers.values()):
            raise MaskError(f"Mask layer `{layer}` is not in the model's weights. Is it another model's?")
    for name in mask.behind:
        if not any(name in tensors for tensors in headers.values()):
            raise MaskError(f"The mask changes `{name}`, which is not in the model's weights. Is it another model's?")
    for path, tensors in headers.items():
        check_rows(path.as_posix(), tensors, mask)
