"""Copy a checkpoint and zero or scale rows in the copy, byte for byte; nothing else changes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch

from nemo_prune.errors import MaskError, ModelError, OutputError
from nemo_prune.folder import check_files, component_names
from nemo_prune.hashing import file_hash
from nemo_prune.layout import is_licence_file
from nemo_prune.mask import NeuronMask
from nemo_prune.stored import FLOAT_DTYPES, StoredTensor, read_header

# Weights in formats that can't be patched by offset, or that repeat what safetensors hold.
_LEFT_OUT_SUFFIXES = (".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        hashes: file relative to the folder -> sha256 of its content, for every file copied.
        base_hashes: the same of the base, for the files that were changed.
        rows_changed: changed file -> number of rows that were set to zero or scaled in it.
        left_out: weights of the base that were not copied.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)
    rows_changed: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def described(self) -> dict:
        """For the record, as JSON values."""
        return {
            "sha256": self.hashes,
            "base_sha256": self.base_hashes,
            "rows_changed": self.rows_changed,
            "left_out": self.left_out,
        }


def files_to_export(base: Path) -> tuple[list[Path], list[Path]]:
    """Files of a checkpoint folder that an export copies, and weights that it leaves out.

    Copied are model_index.json, the folders of the components that it names, and the licence.
    Left out are weights that are not safetensors and copies by other averages (``non_ema``): an
    unpruned twin must not lie beside the pruned weights. What else lies in the folder, such as
    sample images, is none of the pipeline's and stays behind.

    Returns:
        Both relative to the folder, sorted.

    Raises:
        ModelError: a file is damaged, missing, or lies outside of the folder.
    """
    copied = [path.relative_to(base) for path in base.iterdir() if _belongs_at_root(path)]
    left_out = []
    for component in component_names(base):
        for folder, names, files in os.walk(base / component):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in files:
                unpruned_twin = name.endswith(_LEFT_OUT_SUFFIXES) or "non_ema" in name
                path = Path(folder, name).relative_to(base)
                (left_out if unpruned_twin or name.startswith(".") else copied).append(path)
    check_files(base, copied)
    return sorted(copied), sorted(left_out)


def _belongs_at_root(path: Path) -> bool:
    return path.is_file() and (path.name == "model_index.json" or is_licence_file(path.name))


def export_size(base: Path) -> int:
    """Bytes that an export of this folder takes."""
    return sum((base / path).stat().st_size for path in files_to_export(base)[0])


def unet_weights(base: Path) -> list[Path]:
    """The U-Net's safetensors files that an export copies, relative to the folder: shards and variants.

    Raises:
        ModelError: there is none.
    """
    copied = files_to_export(base)[0]
    weights = [path for path in copied if path.parts[0] == "unet" and path.suffix == ".safetensors"]
    if not weights:
        raise ModelError(
            "The model's U-Net has no safetensors weights. Save it as safetensors first: "
            "`DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)`, then prune FOLDER."
        )
    return weights


def export_checkpoint(base: Path, mask: NeuronMask, out: Path, scale: float = 0.0) -> ExportReport:
    """Copy a diffusers folder file by file and zero the masked rows of the U-Net in the copy.

    Every safetensors file of the U-Net that holds a masked layer is patched: shards, and variants
    such as fp16. Files are copied with their content, also where the base holds links.

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
    copied, left_out = files_to_export(base)
    rows = mask.tensor_rows
    headers = {path: read_header(base / path) for path in unet_weights(base)}
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
                report.rows_changed[path.as_posix()] = _scale_rows(target, headers[path], here, scale)
                digest = file_hash(target)
            report.hashes[path.as_posix()] = digest
    except OSError as error:
        raise OutputError(f"The pruned model can't be written to {out}: {error}") from error
    return report


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
            if tensor.shape[:1] != (len(pruned),):
                raise MaskError(
                    f"Mask layer `{layer}` has {len(pruned)} neurons, {path.as_posix()} has "
                    f"{list(tensor.shape)} there. Was the mask made for another model?"
                )
            if tensor.dtype not in FLOAT_DTYPES:
                raise ModelError(
                    f"`{layer}` is stored as {tensor.dtype} in {path.as_posix()}; rows of quantised weights "
                    "can't be zeroed exactly. Use the float32, float16 or bfloat16 weights."
                )


def _scale_rows(
    path: Path, tensors: Mapping[str, StoredTensor], rows: Mapping[str, Sequence[int]], scale: float
) -> int:
    """Multiply rows in place and return their number; zero is all zero bits in every float format."""
    with path.open("r+b") as file:
        for name, indices in rows.items():
            row_bytes = tensors[name].length // tensors[name].shape[0]
            dtype = FLOAT_DTYPES[tensors[name].dtype]
            for index in indices:
                place = tensors[name].start + index * row_bytes
                scaled = bytes(row_bytes)
                if scale:
                    file.seek(place)
                    row = torch.frombuffer(bytearray(file.read(row_bytes)), dtype=dtype)
                    scaled = (row.double() * scale).to(dtype).view(torch.uint8).numpy().tobytes()
                file.seek(place)
                file.write(scaled)
    return sum(len(indices) for indices in rows.values())
