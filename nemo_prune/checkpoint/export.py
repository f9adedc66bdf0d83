"""Copy a checkpoint and zero or scale rows in the copy, byte for byte; nothing else changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from nemo_prune.checkpoint.folder import CheckpointFiles, scan_folder
from nemo_prune.checkpoint.rows import check_rows, scale_rows
from nemo_prune.errors import MaskError, OutputError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.safetensors_header import StoredTensor, read_header
from nemo_prune.mask import NeuronMask, Pruning


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        sha256: file relative to the release -> sha256 of its content, for every file that comes from the base.
        base_sha256: the same of the base, for the files that were changed.
        rows_changed: changed file -> number of rows that were set to zero or scaled in it.
        left_out: what of the base is not in the release -> why.
        notes: what a publisher should say of the form of the weights, in sentences.
    """

    sha256: Mapping[str, str] = field(default_factory=dict)
    base_sha256: Mapping[str, str] = field(default_factory=dict)
    rows_changed: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export_checkpoint(base: Path, mask: NeuronMask, out: Path, scale: float = 0.0) -> ExportReport:
    """Copy a diffusers folder file by file and zero the masked rows of the U-Net in the copy.

    Every safetensors file of the U-Net that holds a masked layer is patched: shards, and variants
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
    after, before, changed = {}, {}, {}
    try:
        for path in files.kept:
            source, target, name = files.folder / path, out / path, path.as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            after[name] = copy_file(source, target, hashed)
            if rows.keys() & headers.get(path, {}).keys():
                changed[name] = scale_rows(target, headers[path], rows, pruning.scale)
                before[name], after[name] = after[name], file_hash(target) if hashed else ""
    except OSError as error:
        raise OutputError(f"The pruned model can't be written to {out}: {error}") from error
    left_out = {path.as_posix(): reason for path, reason in files.left_out.items()}
    return ExportReport(after if hashed else {}, before if hashed else {}, changed, left_out)


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
        if not any(f"{layer}.weight" in tensors for tensors in headers.values()):
            raise MaskError(f"Mask layer `{layer}` is not in the model's weights. Is it another model's?")
    for path, tensors in headers.items():
        check_rows(path.as_posix(), tensors, mask)
