"""Where a release goes: a diffusers folder, or a single file with a folder beside it for everything else.

Pruning is the same for both: the pruned diffusers folder is written first. A single file is made from the base's, or
from that folder, and compared with it tensor by tensor.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_prune.errors import OutputError
from nemo_prune.export import ExportReport, copy_file, export_checkpoint, export_size
from nemo_prune.folder import INDEX_FILE
from nemo_prune.hashing import file_hash
from nemo_prune.layout import CARD_FILE, MASK_FILE, SAFETENSORS, folder_beside, is_single_file
from nemo_prune.mask import NeuronMask
from nemo_prune.single_file import (
    check_single_file,
    folder_tensors,
    masked_tensors,
    patch_single_file,
    write_single_file,
)
from nemo_prune.source import ModelSource
from nemo_prune.staging import check_release_target, staged_folder, sync, writing


@dataclass(frozen=True)
class StagedRelease:
    """Where a release is written before it is put in place.

    Attributes:
        folder: for the pruned diffusers folder; it is empty.
        beside: for mask, record and card: the same folder, or an empty one beside a single file.
        file: the single file to write; None where the release is a folder.
    """

    folder: Path
    beside: Path
    file: Path | None = None


def check_release(source: ModelSource, out: Path, overwrite: bool = False) -> None:
    """Refuse a target before anything is written to it.

    Raises:
        OutputError: it is no name for a release, holds something, would take the model's place, or lacks room.
    """
    given, size = source.given or source.folder, export_size(source.folder)
    if not is_single_file(out):
        return check_release_target(out, given, size, overwrite)
    if out.suffix != SAFETENSORS:
        raise OutputError(f"{out} would be a pickle, which can run programs. Give a name that ends in {SAFETENSORS}.")
    if out.is_dir():
        raise OutputError(f"{out} is a folder. Give another name, or one without {SAFETENSORS} for a folder.")
    if out.exists() and given.exists() and out.samefile(given):
        raise OutputError(f"{out} is the model itself, which is only read. Choose another --out.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists. Choose another --out, or replace it with --overwrite.")
    # The pruned folder lies there too until the file is made.
    return check_release_target(folder_beside(out), given, 2 * size, overwrite)


@contextmanager
def staged_release(out: Path, overwrite: bool = False) -> Iterator[StagedRelease]:
    """A release that appears whole when all went well, and else not at all.

    A single file is put in place last, when its record and its card lie there: without it nothing looks finished.

    Args:
        out: the folder, or the single file, see :func:`check_release`.
        overwrite: whether what stands there may be replaced.

    Raises:
        OutputError: something is in the way, or it can't be written.
    """
    if not is_single_file(out):
        with staged_folder(out, overwrite) as folder:
            yield StagedRelease(folder, folder)
        return
    written, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    with writing(out):
        try:
            with staged_folder(folder_beside(out), overwrite) as staged:
                scratch = staged / "scratch"
                release = StagedRelease(scratch / "model", scratch / "beside", scratch / out.name)
                release.folder.mkdir(parents=True)
                release.beside.mkdir()
                yield release
                _lay_flat(release.beside, staged)
                os.replace(release.file, written)
                sync(written)
                shutil.rmtree(scratch)
                # An old file must not stand beside the new record.
                if out.exists():
                    os.replace(out, old)
            os.replace(written, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
        finally:
            written.unlink(missing_ok=True)
        sync(out.parent)
        old.unlink(missing_ok=True)


def write_weights(source: ModelSource, mask: NeuronMask, release: StagedRelease, scale: float = 0.0) -> ExportReport:
    """Write the pruned weights in the form of the release.

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
    report = export_checkpoint(source.folder, mask, release.folder, scale)
    report = replace(report, left_out={**source.left_out, **report.left_out}, notes=_conversion_notes(source, release))
    if release.file is None:
        return report
    licences = [path for path in release.folder.iterdir() if path.is_file() and path.name != INDEX_FILE]
    for path in licences:
        shutil.copyfile(path, release.beside / path.name)
    if source.single_file and source.single_file.suffix == SAFETENSORS:
        written = _patch_copy(source.single_file, mask, release.file, scale)
    else:
        write_single_file(release.folder, source.variant, release.file)
        written = _made_from_folder(source, mask, release, report)
    check_single_file(release.file, release.folder, source.variant)
    hashes = {path.name: report.hashes[path.name] for path in licences}
    return replace(written, hashes={release.file.name: file_hash(release.file), **hashes})


def _patch_copy(base: Path, mask: NeuronMask, out: Path, scale: float) -> ExportReport:
    base_hash = copy_file(base, out)
    rows, averages = patch_single_file(out, mask, scale)
    notes = ["The file is a copy of the base's in which rows were changed; every other byte is the same."]
    if averages:
        notes.append(
            f"It holds moving averages (EMA) beside the plain weights; both were pruned, {averages} of the {rows} rows "
            "are of averages. What was measured is the plain weights, as diffusers loads them."
        )
    return ExportReport({}, {out.name: base_hash}, {out.name: rows}, {}, tuple(notes))


def _made_from_folder(
    source: ModelSource, mask: NeuronMask, release: StagedRelease, report: ExportReport
) -> ExportReport:
    tensors = folder_tensors(release.folder, source.variant)
    rows = sum(len(mask.tensor_rows[name]) for name in masked_tensors(mask, tensors).values())
    left_out = dict(report.left_out)
    if not source.single_file:
        used = {tensor.file for tensor in tensors.values()}
        parts = {path.partition("/")[0] for path in used}
        for path in report.hashes:
            part = path.partition("/")[0]
            if "/" in path and part not in parts:
                left_out[part] = "a single file has no place for it"
            elif path.endswith(SAFETENSORS) and path not in used:
                left_out[path] = "another variant; the single file holds one"
    return replace(report, base_hashes={}, rows_changed={release.file.name: rows}, left_out=left_out)


def _conversion_notes(source: ModelSource, release: StagedRelease) -> tuple[str, ...]:
    """What happened to the form of the weights; no conversion changes a value."""
    form = "a diffusers folder" if release.file is None else "a single file with the names that A1111 and ComfyUI read"
    if source.single_file:
        config = source.described()["config"]
        kept = f", with the configs, tokenizer and scheduler of {config}" if release.file is None else ""
        return (f"The base, {source.converted}, was converted to {form}{kept}; no value was changed by that.",)
    notes = []
    if source.converted:
        notes.append(
            f"The base's {source.converted.removeprefix('the ')} were converted to safetensors, without a change."
        )
    if release.file is not None:
        notes.append(f"The base, a diffusers folder, was converted to {form}; no value was changed by that.")
    return tuple(notes)


def _lay_flat(release: Path, folder: Path) -> None:
    """Beside a single file, mask and pictures lie where record and card do."""
    inner = (release / MASK_FILE).parent
    files = [path for path in release.rglob("*") if path.is_file()]
    for path in files:
        os.replace(path, folder / path.name)
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    for path in files:
        if path.parent == inner:
            card = card.replace(path.relative_to(release).as_posix(), path.name)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
