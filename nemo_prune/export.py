"""Copy a checkpoint and zero rows in the copy, byte for byte; nothing else changes."""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from nemo_prune.errors import MaskError, ModelError, OutputError
from nemo_prune.mask import NeuronMask

# Weights in formats that can't be patched by offset, or that repeat what safetensors hold.
_LEFT_OUT_SUFFIXES = (".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth")
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        hashes: file relative to the folder -> sha256 of its content, for every file copied.
        base_hashes: the same of the base, for the files that were changed.
        rows_zeroed: changed file -> number of rows that were set to zero in it.
        left_out: weights of the base that were not copied.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)
    rows_zeroed: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype, shape, first byte and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def files_to_export(base: Path) -> tuple[list[Path], list[Path]]:
    """Files of a checkpoint folder that an export copies, and weights that it leaves out.

    Copied are model_index.json, the folders of the components that it names, and the licence.
    Left out are weights that are not safetensors and copies by other averages (``non_ema``): an
    unpruned twin must not lie beside the pruned weights. What else lies in the folder, such as
    sample images, is none of the pipeline's and stays behind.

    Returns:
        Both relative to the folder, sorted.
    """
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    components = sorted(name for name, kind in index.items() if isinstance(kind, list) and kind[0])
    copied = [path.relative_to(base) for path in base.iterdir() if _belongs_at_root(path)]
    left_out = []
    for component in components:
        for folder, names, files in os.walk(base / component):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in files:
                unpruned_twin = name.endswith(_LEFT_OUT_SUFFIXES) or "non_ema" in name
                path = Path(folder, name).relative_to(base)
                (left_out if unpruned_twin or name.startswith(".") else copied).append(path)
    return sorted(copied), sorted(left_out)


def _belongs_at_root(path: Path) -> bool:
    is_licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    return path.is_file() and (path.name == "model_index.json" or is_licence)


def export_size(base: Path) -> int:
    """Bytes that an export of this folder takes."""
    return sum((base / path).stat().st_size for path in files_to_export(base)[0])


def export_checkpoint(base: Path, mask: NeuronMask, out: Path) -> ExportReport:
    """Copy a diffusers folder file by file and zero the masked rows of the U-Net in the copy.

    Every safetensors file of the U-Net that holds a masked layer is patched: shards, and variants
    such as fp16. Files are copied with their content, also where the base holds links.

    Args:
        base: the folder of the unpruned model; it is only read.
        mask: what to prune.
        out: an existing, empty folder.

    Raises:
        ModelError: the U-Net has no safetensors weights, or a file is damaged.
        MaskError: a masked layer is not in the weights or has another number of rows.
        OutputError: the copy can't be written.
    """
    copied, left_out = files_to_export(base)
    weights = [path for path in copied if path.parts[0] == "unet" and path.suffix == ".safetensors"]
    if not weights:
        raise ModelError(
            "The model's U-Net has no safetensors weights. Save it as safetensors first: "
            "`DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)`, then prune FOLDER."
        )
    rows = {
        f"{name}.{part}": pruned.nonzero().flatten().tolist()
        for name, pruned in mask.layers.items()
        for part in ("weight", "bias")
        if pruned.any()
    }
    headers = {path: read_header(base / path) for path in weights}
    _check_rows(mask, headers)
    report = ExportReport(left_out=[path.as_posix() for path in left_out])
    try:
        for path in copied:
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = _copy(base / path, target)
            here = {name: rows[name] for name in headers.get(path, {}) if name in rows}
            if here:
                report.base_hashes[path.as_posix()] = digest
                report.rows_zeroed[path.as_posix()] = _zero_rows(target, headers[path], here)
                digest = file_hash(target)
            report.hashes[path.as_posix()] = digest
    except OSError as error:
        raise OutputError(f"The pruned model can't be written to {out}: {error}") from error
    return report


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie.

    Raises:
        ModelError: the header is damaged or points past the end of the file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(f"tensor `{name}` lies outside the file")
            shape = tuple(entry["shape"])
            tensors[name] = StoredTensor(entry["dtype"], shape, 8 + length + first, last - first)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path.name} is no valid safetensors file: {error}. Fetch it anew.") from error
    return tensors


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that takes the place of ``out`` in one step when all went well, and else vanishes.

    Args:
        out: the target; what stands there stays until the new one is complete.
        overwrite: whether a target that is not empty may be replaced.

    Yields:
        An empty folder beside the target to write to.

    Raises:
        OutputError: the target is not empty, or its parent can't be written.
    """
    check_target(out, overwrite)
    staging, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    try:
        # What a killed run left behind.
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{out.parent} can't be written: {error}") from error
    try:
        yield staging
        _sync_files(staging)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(staging, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_new_file(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, and make the folder that it will lie in.

    Raises:
        OutputError: it exists and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Choose another --out, or replace it with --overwrite.")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)


def check_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a target that holds something, unless it may be replaced.

    Raises:
        OutputError: it is a file, or not empty, or not writable.
    """
    if out.is_file():
        raise OutputError(f"{out} is a file. Give a folder.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out} exists and is not empty. Choose another folder or use --overwrite.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not writable. Choose another folder.")


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> str:
    """Copy a file's content, never its link, and return the content's sha256."""
    digest = sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            digest.update(block)
            writer.write(block)
    return digest.hexdigest()


def _check_rows(mask: NeuronMask, headers: Mapping[Path, Mapping[str, StoredTensor]]) -> None:
    found: dict[str, list[tuple[Path, StoredTensor]]] = {}
    for path, tensors in headers.items():
        for name, tensor in tensors.items():
            found.setdefault(name, []).append((path, tensor))
    for layer, pruned in mask.layers.items():
        if f"{layer}.weight" not in found:
            raise MaskError(f"Mask layer `{layer}` is not in the model's weights. Is it another model's?")
        for path, tensor in found[f"{layer}.weight"] + found.get(f"{layer}.bias", []):
            if tensor.shape[0] != len(pruned):
                raise MaskError(
                    f"Mask layer `{layer}` has {len(pruned)} neurons, {path.as_posix()} has "
                    f"{tensor.shape[0]} rows there. Was the mask made for another model?"
                )
            if tensor.dtype not in _FLOAT_BYTES:
                raise ModelError(
                    f"`{layer}` is stored as {tensor.dtype} in {path.as_posix()}; rows of quantised weights "
                    "can't be zeroed exactly. Use the float32, float16 or bfloat16 weights."
                )
            if tensor.length != _FLOAT_BYTES[tensor.dtype] * _numel(tensor.shape):
                raise ModelError(f"`{layer}` has the wrong length in {path.as_posix()}. Fetch the file anew.")


def _zero_rows(path: Path, tensors: Mapping[str, StoredTensor], rows: Mapping[str, Sequence[int]]) -> int:
    """Zero rows in place and return their number; zero is all zero bits in every float format."""
    with path.open("r+b") as file:
        for name, indices in rows.items():
            row_bytes = tensors[name].length // tensors[name].shape[0]
            for index in indices:
                file.seek(tensors[name].start + index * row_bytes)
                file.write(bytes(row_bytes))
    return sum(len(indices) for indices in rows.values())


def _sync_files(folder: Path) -> None:
    """Bring the files to disk before the rename makes them look finished."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
