"""Copy a checkpoint and zero or scale rows in the copy, byte for byte; nothing else changes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from nemo_prune.checkpoint.folder import INDEX_FILE, check_files, component_names
from nemo_prune.checkpoint.rows import check_rows, scale_rows
from nemo_prune.errors import MaskError, ModelError, OutputError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import is_licence_file
from nemo_prune.files.safetensors_header import StoredTensor, read_header
from nemo_prune.mask import NeuronMask

# Weights in formats that can't be patched by offset, or that repeat what safetensors hold.
_OTHER_FORMATS = (".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        hashes: file relative to the release -> sha256 of its content, for every file of the base's.
        base_hashes: the same of the base, for the files that were changed.
        rows_changed: changed file -> number of rows that were set to zero or scaled in it.
        left_out: what of the base is not in the release -> why.
        notes: what a publisher should say of the form of the weights, in sentences.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    base_hashes: dict[str, str] = field(default_factory=dict)
    rows_changed: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def described(self) -> dict:
        """For the record, as JSON values."""
        return {
            "sha256": self.hashes,
            "base_sha256": self.base_hashes,
            "rows_changed": self.rows_changed,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }


def files_to_export(base: Path) -> tuple[list[Path], dict[Path, str]]:
    """Files of a checkpoint folder that an export copies, and weights that it leaves out.

    Copied are model_index.json, the folders of the components that it names, and the licence.
    Left out are weights that are not safetensors and copies by other averages (``non_ema``): an
    unpruned twin must not lie beside the pruned weights. What else lies in the folder, such as
    sample images, is none of the pipeline's and stays behind.

    Returns:
        The files relative to the folder, sorted; and those left out -> why.

    Raises:
        ModelError: a file is damaged, missing, or lies outside of the folder.
    """
    copied = [path.relative_to(base) for path in base.iterdir() if _belongs_at_root(path)]
    left_out = {}
    for component in component_names(base):
        for folder, names, files in os.walk(base / component):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in files:
                path = Path(folder, name).relative_to(base)
                if reason := _why_left_out(name):
                    left_out[path] = reason
                else:
                    copied.append(path)
    check_files(base, copied)
    return sorted(copied), dict(sorted(left_out.items()))


def _why_left_out(name: str) -> str | None:
    if name.startswith("."):
        return "a hidden file"
    if "non_ema" in name:
        return "weights of another average (non_ema)"
    if name.endswith(_OTHER_FORMATS) or ".bin.index." in name:
        return "not safetensors; the weights lie there as safetensors too"
    return None


def _belongs_at_root(path: Path) -> bool:
    return path.is_file() and (path.name == INDEX_FILE or is_licence_file(path.name))


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


def export_checkpoint(base: Path, mask: NeuronMask, out: Path, scale: float = 0.0, hashed: bool = True) -> ExportReport:
    """Copy a diffusers folder file by file and zero the masked rows of the U-Net in the copy.

    Every safetensors file of the U-Net that holds a masked layer is patched: shards, and variants
    such as fp16. Files are copied with their content, also where the base holds links.

    Args:
        base: the folder of the unpruned model; it is only read.
        mask: what to prune.
        out: an existing, empty folder.
        scale: what the masked rows are multiplied by; the paper tries -1 to 0.75.
        hashed: whether the report has sha256, which takes most of the time.

    Raises:
        ModelError: the U-Net has no safetensors weights, or a file is damaged.
        MaskError: a masked layer is not in the weights or has another number of rows.
        OutputError: the copy can't be written.
    """
    copied, left_out = files_to_export(base)
    rows = mask.tensor_rows
    headers = {path: read_header(base / path) for path in unet_weights(base)}
    _check_layers(mask, headers)
    report = ExportReport(left_out={path.as_posix(): reason for path, reason in left_out.items()})
    try:
        for path in copied:
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            name, is_changed = path.as_posix(), bool(rows.keys() & headers.get(path, {}).keys())
            digest = copy_file(base / path, target, hashed)
            if is_changed:
                report.rows_changed[name] = scale_rows(target, headers[path], rows, scale)
            if hashed:
                report.hashes[name] = file_hash(target) if is_changed else digest
            if hashed and is_changed:
                report.base_hashes[name] = digest
    except OSError as error:
        raise OutputError(f"The pruned model can't be written to {out}: {error}") from error
    return report


def copy_file(source: Path, target: Path, hashed: bool = True) -> str:
    """Copy a file's content, never its link, and return the content's sha256, or nothing where it is not asked for."""
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
