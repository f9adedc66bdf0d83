"""Where a release goes: a diffusers folder, or a single file with a folder beside it for everything else.

Pruning is the same for both: the pruned diffusers folder is written first. A single file is made from the base's, or
from that folder, and compared with it tensor by tensor.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.checkpoint.export import export_size
from nemo_prune.checkpoint.single_file import folder_tensors
from nemo_prune.errors import OutputError
from nemo_prune.files.layout import CARD_FILE, MASK_FILE, SAFETENSORS, folder_beside, is_single_file
from nemo_prune.files.staging import check_release_target, staged_folder, sync, writing
from nemo_prune.models.source import ModelSource


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
        ModelError: the model can't be a single file.
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
    # What has no place in a single file is known before the long work.
    folder_tensors(source.folder, source.variant)
    # The pruned folder lies there too until the file is made.
    return check_release_target(folder_beside(out), given, 2 * size, overwrite or _was_cut_off(out))


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
    written, old = _beside(out, "partial"), _beside(out, "old")
    with writing(out):
        try:
            with staged_folder(folder_beside(out), overwrite or _was_cut_off(out)) as staged:
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


def _was_cut_off(out: Path) -> bool:
    """Whether a run was killed when the folder of a single file was in place and the file was not yet."""
    return _beside(out, "partial").exists() and not out.exists()


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


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
