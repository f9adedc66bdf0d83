"""The pruned weights, in the form that a release has: a diffusers folder or a single file."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nemo_prune.checkpoint.export import ExportReport, copy_file, export_checkpoint
from nemo_prune.checkpoint.folder import INDEX_FILE
from nemo_prune.checkpoint.single_file import (
    FolderTensor,
    check_single_file,
    folder_tensors,
    masked_tensors,
    patch_single_file,
    write_single_file,
)
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import SAFETENSORS
from nemo_prune.mask import NeuronMask
from nemo_prune.models.source import ModelSource
from nemo_prune.release.targets import StagedRelease


def write_weights(source: ModelSource, mask: NeuronMask, release: StagedRelease, scale: float = 0.0) -> ExportReport:
    """Write the pruned weights: always as a diffusers folder, and as a single file where the release is one.

    A single file is a patched copy of the base's where that is a .safetensors file too, else it is made from the
    pruned folder. In either case it is compared with the folder, tensor by tensor.

    Args:
        source: the base.
        mask: what to prune.
        release: where to.
        scale: what the masked rows are multiplied by.

    Raises:
        ModelError: the base is damaged, or has a tensor that a single file has no place for.
        MaskError: a masked layer is not in the weights or has another number of rows.
        OutputError: the weights can't be written, or are not what they should be.
    """
    is_folder = release.file is None
    report = export_checkpoint(source.folder, mask, release.folder, scale, hashed=is_folder)
    report = replace(report, left_out={**source.left_out, **report.left_out}, notes=_notes(source, is_folder))
    if is_folder:
        return report
    if source.single_file and source.single_file.suffix == SAFETENSORS:
        report = _patch_copy(source.single_file, mask, release.file, scale)
    else:
        write_single_file(release.folder, source.variant, release.file)
        tensors = folder_tensors(release.folder, source.variant)
        pruned = mask.tensor_rows
        rows = sum(len(pruned[name]) for name in masked_tensors(mask, tensors).values())
        left_out = report.left_out
        if not source.single_file:
            left_out = left_out | _left_out(release.folder, tensors.values())
        report = replace(report, rows_changed={release.file.name: rows}, left_out=left_out)
    check_single_file(release.file, release.folder, source.variant)
    report.hashes[release.file.name] = file_hash(release.file)
    for path in release.folder.iterdir():
        # The licence and the like, which lie at the root.
        if path.is_file() and path.name != INDEX_FILE:
            shutil.copyfile(path, release.beside / path.name)
            report.hashes[path.name] = file_hash(path)
    return report


def _patch_copy(base: Path, mask: NeuronMask, out: Path, scale: float) -> ExportReport:
    base_hash = copy_file(base, out)
    rows, averages = patch_single_file(out, mask, scale)
    notes = ["The file is a copy of the base's in which rows were changed; every other byte is the same."]
    if averages:
        notes.append(
            f"It holds moving averages (EMA) beside the plain weights; both were pruned, {averages} of the {rows} rows "
            "are of averages. What was measured is the plain weights, as diffusers loads them."
        )
    return ExportReport(base_hashes={out.name: base_hash}, rows_changed={out.name: rows}, notes=tuple(notes))


def _left_out(folder: Path, tensors: Iterable[FolderTensor]) -> dict[str, str]:
    """What of a diffusers folder is not in the single file that was made from it."""
    used = {Path(tensor.file) for tensor in tensors}
    parts = {path.parts[0] for path in used}
    left_out = {}
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        if len(path.parts) > 1 and path.parts[0] not in parts:
            left_out[path.parts[0]] = "a single file has no place for it"
        elif path.suffix == SAFETENSORS and path not in used:
            left_out[path.as_posix()] = "another variant; the single file holds one"
    return left_out


def _notes(source: ModelSource, is_folder: bool) -> tuple[str, ...]:
    """What happened to the form of the weights; no conversion changes a value."""
    if source.single_file:
        config = source.described()["config"]
        into = f"a diffusers folder, with configs, tokenizer and scheduler of {config}" if is_folder else "safetensors"
        return (f"The base, {source.converted}, was converted to {into}; no value was changed by that.",)
    notes = []
    if source.converted:
        what = source.converted.removeprefix("the ")
        notes.append(f"The base's {what} were converted to safetensors; no value was changed by that.")
    if not is_folder:
        notes.append(
            "The base, a diffusers folder, was converted to a single file with the names that A1111 and ComfyUI read; "
            "no value was changed by that."
        )
    return tuple(notes)
