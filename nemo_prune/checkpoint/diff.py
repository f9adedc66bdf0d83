"""What differs between a base and a pruned model: every file, every tensor, every row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.ldm_names import PREFIXES, full_name
from nemo_prune.checkpoint.privacy import cleaned_config, cleaned_metadata
from nemo_prune.checkpoint.rows import with_changes_behind
from nemo_prune.checkpoint.single_file import folder_tensors, masked_tensors, read_tensors
from nemo_prune.checkpoint.tensors import TensorBytes, differing_rows, equal_bytes, stored_tensor, tensor_digest
from nemo_prune.checkpoint.twins import base_rows, files_with_rows
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import CARD_FILE, RECORD_FILE, SAFETENSORS, has_ending, is_licence_file
from nemo_prune.files.mask_tensors import METADATA_KEY
from nemo_prune.files.safetensors_header import StoredTensor, read_header, read_metadata
from nemo_prune.files.untrusted import read_json
from nemo_prune.mask import NeuronMask

# What a release adds to the base's files, and what it may rewrite.
_OF_THE_RELEASE = (CARD_FILE, RECORD_FILE, "nemo_prune/")


@dataclass(frozen=True)
class Difference:
    """One file or tensor that differs.

    Attributes:
        file: relative to the folders, or the name of the single file.
        what: ``left out`` of the base's, ``added``, ``changed`` as a whole, ``rows`` of a tensor or ``metadata``
            changed, a bias ``shifted`` or a tensor ``compensated`` as the mask says, or ``unpruned rows`` of the base
            in it.
        tensor: its name, where a tensor differs.
        rows: the rows that differ.
        expected: whether a mask accounts for it: masked rows alone, what it changes behind them, or a file that belongs
            to a release.
        layer: the tensor's name in a diffusers folder, if a mask touches it in a single file.
    """

    file: str
    what: Literal["left out", "added", "changed", "rows", "shifted", "compensated", "metadata", "unpruned rows"]
    tensor: str | None = None
    rows: tuple[int, ...] = ()
    expected: bool = False
    layer: str | None = None


def diff_models(
    base: Path, out: Path, mask: NeuronMask | None = None, variant: str | None = None
) -> Iterator[Difference]:
    """Compare a pruned model with its base; tensors are read in blocks and never held as a whole.

    Two folders are compared file by file, and no file of the pruned one may hold the base's masked rows, whatever
    its name. Two .safetensors files are compared tensor by tensor. Of a folder and a single file, and of
    a .ckpt, the tensors are compared: what a conversion leaves out is accounted for.

    Args:
        base: the unpruned diffusers folder or single file.
        out: the pruned one.
        mask: rows that may differ; without it none may.
        variant: of a folder's weights, if the other is a single file.

    Yields:
        What differs.

    Raises:
        ModelError: a file of either is damaged.
    """
    if base.is_dir() and out.is_dir():
        yield from diff_folders(base, out, mask)
    else:
        yield from _diff_single(base, out, mask, variant)


def diff_folders(base: Path, out: Path, mask: NeuronMask | None = None) -> Iterator[Difference]:
    """Compare a pruned folder with its base; tensors are read in blocks and never held as a whole.

    Args:
        base: the unpruned diffusers folder.
        out: the pruned one.
        mask: rows that may differ; without it none may.

    Yields:
        What differs, file by file.

    Raises:
        ModelError: a safetensors file of either is damaged.
    """
    files = scan_folder(base)
    copied, left_out = (set(map(Path.as_posix, paths)) for paths in (files.kept, files.left_out))
    ours = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    for name in sorted(copied | left_out | ours):
        if name not in ours:
            yield Difference(name, "left out", expected=name in left_out)
        elif name.startswith(_OF_THE_RELEASE):
            yield Difference(name, "added", expected=True)
        elif name not in copied:
            # A publisher adds the licence's text if the base had none.
            yield Difference(name, "added", expected="/" not in name and is_licence_file(name))
        elif name.endswith(SAFETENSORS):
            yield from _diff_tensors(base / name, out / name, name, mask)
        elif file_hash(base / name) != file_hash(out / name):
            yield Difference(name, "changed", expected=_is_cleaned(base, out, Path(name)))
    if mask is not None:
        for path in files_with_rows(out, base_rows(files, mask)):
            yield Difference(path.as_posix(), "unpruned rows")


def _is_cleaned(base: Path, out: Path, path: Path) -> bool:
    """Whether a config differs only by what must not be published."""
    cleaned = cleaned_config(base, path)
    return cleaned is not None and read_json(out / path) == cleaned[0]


def _diff_tensors(base: Path, out: Path, name: str, mask: NeuronMask | None) -> Iterator[Difference]:
    before, after = read_header(base), read_header(out)
    if _forms(before) != _forms(after) or not _metadata_fits(base, out):
        yield Difference(name, "changed")
        return
    if read_metadata(base) != read_metadata(out):
        yield Difference(name, "metadata", expected=True)
    mask = mask if name.startswith("unet/") else None
    for tensor, stored in before.items():
        contents = stored_tensor(base, stored), stored_tensor(out, after[tensor])
        if found := _changed(mask, tensor, *contents):
            yield Difference(name, tensor=tensor, **found)


def _changed(mask: NeuronMask | None, tensor: str, before: TensorBytes, after: TensorBytes) -> dict | None:
    """How a tensor differs, and whether a mask accounts for it: it prunes the rows, or gives the very values behind.

    Args:
        mask: the mask, if there is one.
        tensor: its name in a diffusers folder; empty where no mask touches it.
        before: the base's.
        after: the pruned model's.

    Returns:
        Attributes of a :class:`Difference`; None where both are the same.
    """
    rows = differing_rows(before, after)
    if not rows:
        return None
    is_behind = mask is not None and tensor in mask.behind and mask.fits_behind(tensor, before.shape)
    if is_behind and _is_as_told(mask, tensor, before, after):
        return {"what": "shifted" if tensor in mask.shifts else "compensated", "expected": True}
    pruned = mask.tensor_rows.get(tensor, ()) if mask else ()
    return {"what": "rows", "rows": rows, "expected": set(rows) <= set(pruned)}


def _is_as_told(mask: NeuronMask, tensor: str, before: TensorBytes, after: TensorBytes) -> bool:
    """Whether a tensor behind the attention is what a mask makes of the base's, by its digest where it says no more."""
    if tensor in mask.withheld:
        return tensor_digest(after) in mask.withheld[tensor]
    return equal_bytes(with_changes_behind(before, tensor, mask), after)


def _metadata_fits(base: Path, out: Path) -> bool:
    """Whether a pruned file's metadata are the base's, without what must not be published."""
    before, after = read_metadata(base), read_metadata(out)
    after.pop(METADATA_KEY, None)
    return after in (before, *(cleaned_metadata(before, changed)[0] for changed in (True, False)))


def _forms(tensors: Mapping[str, StoredTensor]) -> list[tuple]:
    """Names, dtypes and shapes in the order of the file; where they begin depends on the length of the header."""
    in_file = sorted(tensors, key=lambda name: tensors[name].start)
    return [(name, tensors[name].dtype, tensors[name].shape) for name in in_file]


@dataclass(frozen=True)
class _Named:
    """A tensor under the name that both sides share, and its name on its own side."""

    file: str
    name: str
    content: TensorBytes


def _diff_single(base: Path, out: Path, mask: NeuronMask | None, variant: str | None) -> Iterator[Difference]:
    in_place = has_ending(base, SAFETENSORS) and has_ending(out, SAFETENSORS)
    if in_place:
        if _forms(read_header(base)) != _forms(read_header(out)) or not _metadata_fits(base, out):
            yield Difference(out.name, "changed")
        elif read_metadata(base) != read_metadata(out):
            yield Difference(out.name, "metadata", expected=True)
    before, after = _tensors(base, variant), _tensors(out, variant)
    masked = masked_tensors(mask, after) if mask else {}
    for name in sorted(before.keys() | after.keys()):
        shown = after.get(name) or before[name]
        where = {"file": shown.file, "tensor": shown.name, "layer": masked.get(name) if out.is_file() else None}
        if name not in after:
            is_extra = not name.startswith(tuple(PREFIXES.values())) or name.endswith(".position_ids")
            yield Difference(what="left out", expected=is_extra and not in_place, **where)
        elif name not in before:
            yield Difference(what="added", **where)
        elif _form(before[name].content) != _form(after[name].content):
            yield Difference(what="changed", **where)
        elif found := _changed(mask, masked.get(name, ""), before[name].content, after[name].content):
            yield Difference(**found, **where)


def _tensors(path: Path, variant: str | None) -> dict[str, _Named]:
    """The tensors of a folder or a single file, by the full names of single files."""
    if path.is_dir():
        return {
            name: _Named(each.file, each.name, each.content)
            for name, each in folder_tensors(scan_folder(path), variant).items()
        }
    return {full_name(name): _Named(path.name, name, content) for name, content in read_tensors(path).items()}


def _form(tensor: TensorBytes) -> tuple[str, int, tuple[int, ...]]:
    """Dtype, length and rows: a matrix and a 1x1 convolution are the same."""
    return tensor.dtype, tensor.length, tensor.shape[:1]
