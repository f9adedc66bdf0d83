"""A release on disk: pruned weights in their form, and mask, record, plot and card beside them.

A single file is made from the base's, or from the base's folder, patched in place, and compared with the base tensor by
tensor.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_prune.checkpoint.export import export_files
from nemo_prune.checkpoint.fingerprint import pruned_digests
from nemo_prune.checkpoint.folder import CheckpointFiles
from nemo_prune.checkpoint.parts import publicly_named
from nemo_prune.checkpoint.privacy import cleaned_metadata
from nemo_prune.checkpoint.single_file import (
    FolderTensor,
    check_single_file,
    folder_tensors,
    masked_tensors,
    patch_single_file,
    write_single_file,
    written_metadata,
)
from nemo_prune.checkpoint.tensors import FORMAT_ONLY
from nemo_prune.errors import OutputError
from nemo_prune.facts import ExportReport, MaskFacts
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import SAFETENSORS, ReleaseLayout, has_ending
from nemo_prune.files.pictures import save_layer_bars
from nemo_prune.files.safetensors_header import copy_with_metadata, read_metadata, replace_metadata
from nemo_prune.files.staging import check_release_target, staged_folder, sync, writing
from nemo_prune.mask import NeuronMask, Pruning
from nemo_prune.models.source import ModelSource
from nemo_prune.models.validation import check_loads
from nemo_prune.release.card import model_card
from nemo_prune.release.record import Record

# A sha256 takes its place in a header when it is known.
_NOT_YET = "0" * 64


@dataclass(frozen=True)
class StagedRelease:
    """Where a release is written before it is put in place.

    Attributes:
        layout: of the release as it is being written.
        folder: for the pruned diffusers folder; it is empty.
    """

    layout: ReleaseLayout
    folder: Path


def check_release(source: ModelSource, out: Path, overwrite: bool = False) -> None:
    """Refuse a target before anything is written to it.

    Raises:
        OutputError: it is not a name for a release, holds something, would take the model's place, or lacks room.
        ModelError: the model can't be a single file.
    """
    given, size, layout = source.given or source.folder, source.files.size, ReleaseLayout.of(out)
    if layout.file is None:
        return check_release_target(out, given, size, overwrite)
    if not has_ending(out, SAFETENSORS):
        raise OutputError(f"{out} would be a pickle, which can run programs. Give a name that ends in {SAFETENSORS}.")
    if out.is_dir():
        raise OutputError(f"{out} is a folder. Give another name, or one without {SAFETENSORS} for a folder.")
    if out.exists() and given.exists() and out.samefile(given):
        raise OutputError(f"{out} is the model itself, which is only read. Choose another --out.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists. Choose another --out, or replace it with --overwrite.")
    # What has no place in a single file is known before the long work.
    folder_tensors(source.files, source.variant)
    # A run writes the pruned folder too, to load it.
    return check_release_target(layout.folder, given, 2 * size, overwrite or _was_cut_off(out))


@contextmanager
def staged_release(out: Path, overwrite: bool = False) -> Iterator[StagedRelease]:
    """A release that appears whole when all went well, and else not at all.

    A single file is put in place last, when its record and its card are there: without it nothing looks finished.

    Args:
        out: the folder, or the single file, see :func:`check_release`.
        overwrite: whether what stands there may be replaced.

    Raises:
        OutputError: something is in the way, or it can't be written.
    """
    layout = ReleaseLayout.of(out)
    if layout.file is None:
        with staged_folder(out, overwrite) as folder:
            yield StagedRelease(ReleaseLayout(folder), folder)
        return
    written, old = _beside(out, "partial"), _beside(out, "old")
    with writing(out):
        try:
            with staged_folder(layout.folder, overwrite or _was_cut_off(out)) as staged:
                scratch = staged / "scratch"
                release = StagedRelease(ReleaseLayout(staged, scratch / out.name), scratch / "model")
                release.folder.mkdir(parents=True)
                yield release
                os.replace(release.layout.file, written)
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


def write_weights(source: ModelSource, pruning: Pruning, release: StagedRelease, loadable: bool = True) -> ExportReport:
    """Write the pruned weights: as a diffusers folder, or as a single file where the release is one.

    A single file is a patched copy of the base's where that is a .safetensors file too, else it is made from the
    base's folder and patched. In either case it is compared with the base, tensor by tensor.

    Args:
        source: the base.
        pruning: the mask, and what its rows are multiplied by.
        release: where to.
        loadable: whether a folder is needed beside a single file too, to load the pruned model from.

    Raises:
        ModelError: the base is damaged, or has a tensor that a single file has no place for.
        MaskError: a masked layer is not in the weights or has another number of rows.
        OutputError: the weights can't be written, or are not what they should be.
    """
    file = release.layout.file
    report = ExportReport(left_out=publicly_named(source.files.left_out))
    if file is None or loadable:
        report = export_files(source.files, pruning, release.folder, hashed=file is None)
        check_loads(release.folder)
    report = replace(report, left_out={**source.left_out, **report.left_out}, notes=_notes(source, file is None))
    if file is None:
        return report
    # A file is hashed while another thing is done with it: that takes as long as to read and write it.
    with ThreadPoolExecutor(max_workers=1) as beside:
        if source.single_file and has_ending(source.single_file, SAFETENSORS):
            report = _patch_copy(source.single_file, pruning, file, beside)
        else:
            digest = beside.submit(lambda: source.digest)
            with writing(file):
                metadata = written_metadata(FORMAT_ONLY, _NOT_YET, pruning)
                write_single_file(source.files, source.variant, file, metadata)
            patch_single_file(file, pruning)
            replace_metadata(file, written_metadata(FORMAT_ONLY, digest.result(), pruning))
            report = _described(report, source, source.files, pruning, file)
        hashed = beside.submit(file_hash, file)
        check_single_file(file, source.files, source.variant, pruning)
        hashes = {file.name: hashed.result()}
    for name in source.files.licence_texts:
        shutil.copyfile(source.folder / name, release.layout.folder / name)
        hashes[name] = file_hash(source.folder / name)
    return replace(report, sha256=hashes)


def write_mask(release: StagedRelease, mask: NeuronMask, facts: MaskFacts) -> None:
    """Put the mask beside the pruned weights, without what undoes a part of the pruning.

    Args:
        release: with the weights in place.
        mask: the whole one.
        facts: what its file says beside it.
    """
    layout = release.layout
    layout.mask.parent.mkdir(exist_ok=True)
    digests = pruned_digests(layout.file or release.folder, mask) if mask.combinations else {}
    mask.published(digests).save(layout.mask, facts)


def write_documents(layout: ReleaseLayout, record: Record, examples: Sequence[str] = ()) -> Record:
    """Put record, plot and card beside pruned weights and their mask.

    Args:
        layout: of the release, with the mask in place, and with the grid where there are examples.
        record: of a run or of an export.
        examples: captions to publish.

    Returns:
        The record, with the mask's sha256.
    """
    record = replace(record, mask=replace(record.mask, sha256=file_hash(layout.mask)))
    record.save(layout.record)
    save_layer_bars(layout.plot, record.mask.counts, record.mask.sizes)
    layout.card.write_text(model_card(record, layout, examples), encoding="utf-8")
    return record


def _was_cut_off(out: Path) -> bool:
    """Whether a run was killed when the folder of a single file was in place and the file was not yet."""
    return _beside(out, "partial").exists() and not out.exists()


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


def _patch_copy(base: Path, pruning: Pruning, out: Path, beside: Executor) -> ExportReport:
    hashed = beside.submit(file_hash, base)
    kept, dropped = cleaned_metadata(read_metadata(base), tensors_changed=True)
    copy_with_metadata(base, out, written_metadata(kept, _NOT_YET, pruning))
    rows, averages = patch_single_file(out, pruning)
    base_hash = hashed.result()
    replace_metadata(out, written_metadata(kept, base_hash, pruning))
    notes = ["The tensors are the base's, byte for byte, but for the rows that were changed."]
    if averages:
        notes.append(
            f"It holds moving averages (EMA) beside the plain weights; both were pruned, {averages} of the {rows} rows "
            "are of averages. What was measured is the plain weights, as diffusers loads them."
        )
    gone = {out.name: dropped} if dropped else {}
    return ExportReport({}, {out.name: base_hash}, {out.name: rows}, dropped=gone, notes=tuple(notes))


def _described(
    report: ExportReport, source: ModelSource, base: CheckpointFiles, pruning: Pruning, file: Path
) -> ExportReport:
    """What the export of a folder says of the single file that was made from it."""
    tensors, rows_of = folder_tensors(base, source.variant), pruning.mask.tensor_rows
    rows = sum(len(rows_of.get(name, ())) for name in masked_tensors(pruning.mask, tensors).values())
    left_out = {} if source.single_file else _left_out(base, tensors.values())
    return replace(report, rows_changed={file.name: rows}, left_out={**report.left_out, **left_out}, base_sha256={})


def _left_out(files: CheckpointFiles, tensors: Iterable[FolderTensor]) -> dict[str, str]:
    """What of a diffusers folder is not in the single file that was made from it."""
    used = {Path(tensor.file) for tensor in tensors}
    parts = {path.parts[0] for path in used}
    left_out = {}
    for path in files.kept:
        if len(path.parts) > 1 and path.parts[0] not in parts:
            left_out[path.parts[0]] = "a single file has no place for it"
        elif path.suffix == SAFETENSORS and path not in used:
            left_out[path.as_posix()] = "another variant; the single file holds one"
    return left_out


def _notes(source: ModelSource, is_folder: bool) -> tuple[str, ...]:
    """What happened to the form of the weights; no conversion changes a value."""
    if source.single_file:
        config = source.facts.config
        into = f"a diffusers folder, with configs, tokenizer and scheduler of {config}" if is_folder else "safetensors"
        return (f"The base, {source.converted}, was converted to {into}; no value was changed by that.",)
    notes = list(source.notes)
    if source.converted:
        what = source.converted.removeprefix("the ")
        notes.append(f"The base's {what} were converted to safetensors; no value was changed by that.")
    if not is_folder:
        notes.append(
            "The base, a diffusers folder, was converted to a single file with the names that A1111 and ComfyUI read; "
            "no value was changed by that."
        )
    return tuple(notes)
