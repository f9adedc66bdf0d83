"""A checkpoint folder of unknown origin: which files are its own, and whether they fit together."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_prune.errors import ModelError
from nemo_prune.files.layout import SAFETENSORS, is_licence_file
from nemo_prune.files.untrusted import read_json

INDEX_FILE = "model_index.json"
# Weights in formats that can't be patched by offset, or that duplicate the safetensors.
_OTHER_FORMATS = (".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth")
_COMPONENT = re.compile(r"\w[\w-]*", re.ASCII)
_SHARD_INDEX = re.compile(r".+\.safetensors\.index\.(.+\.)?json")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a diffusers folder, scanned once.

    Attributes:
        folder: the diffusers folder.
        kept: the files that a release keeps, relative to the folder, sorted.
        left_out: the other files of its components -> why an export leaves them out.
    """

    folder: Path
    kept: tuple[Path, ...]
    left_out: Mapping[Path, str]

    @property
    def size(self) -> int:
        """Bytes of the files that are kept."""
        return sum((self.folder / path).stat().st_size for path in self.kept)

    @property
    def unet_weights(self) -> tuple[Path, ...]:
        """The U-Net's safetensors files, relative to the folder: shards and variants.

        Raises:
            ModelError: there is none.
        """
        weights = tuple(path for path in self.kept if path.parts[0] == "unet" and path.suffix == SAFETENSORS)
        if not weights:
            raise ModelError(
                "The model's U-Net has no safetensors weights. Save it as safetensors first: "
                "`DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)`, then prune FOLDER."
            )
        return weights

    @property
    def licence_texts(self) -> tuple[str, ...]:
        """Names of the licence texts at the root."""
        return tuple(path.name for path in self.kept if len(path.parts) == 1 and is_licence_file(path.name))

    def copied_to(self, folder: Path) -> "CheckpointFiles":
        """The same files in a copy, which has the kept files only."""
        return replace(self, folder=folder, left_out={})


def scan_folder(base: Path) -> CheckpointFiles:
    """Scan a diffusers folder: what an export copies, and what it leaves out.

    Copied are model_index.json, the folders of the components that it names, and the licence.
    Left out are weights that are not safetensors and copies by other averages (``non_ema``): an
    unpruned twin must not be beside the pruned weights. Other content of the folder, such as
    sample images, is not part of the pipeline and stays behind.

    Raises:
        ModelError: a file is damaged, missing, or outside of the folder.
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
    return CheckpointFiles(base, tuple(sorted(copied)), dict(sorted(left_out.items())))


def _why_left_out(name: str) -> str | None:
    if name.startswith("."):
        return "a hidden file"
    if "non_ema" in name:
        return "weights of another average (non_ema)"
    if name.endswith(_OTHER_FORMATS) or ".bin.index." in name:
        return "not safetensors; the same weights are there as safetensors"
    return None


def _belongs_at_root(path: Path) -> bool:
    return path.is_file() and (path.name == INDEX_FILE or is_licence_file(path.name))


def read_model_index(base: Path) -> dict:
    """The parts of a diffusers folder, as its model_index.json names them.

    Raises:
        ModelError: it is missing or damaged.
    """
    return _read_object(base, Path(INDEX_FILE))


def component_names(base: Path) -> list[str]:
    """The subfolders that a diffusers folder consists of, sorted.

    Raises:
        ModelError: model_index.json is missing or damaged, or names something that cannot be a subfolder.
    """
    index = read_model_index(base)
    names = sorted(name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0])
    for name in names:
        if not _COMPONENT.fullmatch(name):
            raise ModelError(
                f"{INDEX_FILE} names the component {name!r}, which is not a valid name of a subfolder. Correct it."
            )
    return names


def check_files(base: Path, paths: Collection[Path]) -> None:
    """Refuse files outside of their folder, what is not a regular file, and incomplete shards.

    Links are followed within the folder and, for a snapshot in the cache of the Hub's client, to the places where
    the client keeps files: the folder of the repo, and the store that all repos share.

    Args:
        base: the checkpoint folder.
        paths: relative to it.

    Raises:
        ModelError: one can't be used.
    """
    homes = _homes(base)
    for path in paths:
        real = Path(os.path.realpath(base / path))
        if not path.as_posix().isprintable():
            raise ModelError(f"The file {str(path)!r} of the model has a name that can't be printed. Rename it.")
        if not any(real.is_relative_to(home) for home in homes):
            raise ModelError(
                f"{path} of the model {base} is a link to {real}, which is outside of it. Copy the model with what "
                f"its links lead to, `cp -rL {base} COPY`, and give the copy."
            )
        # A pipe or a device would be read without end.
        if not real.is_file() or not os.access(real, os.R_OK):
            raise ModelError(f"{path} of the model {base} is not a regular file. Fetch the model again.")
    for path in paths:
        if _SHARD_INDEX.fullmatch(path.name):
            _check_shards(base, path, paths)


def _homes(base: Path) -> list[Path]:
    base = Path(os.path.realpath(base))
    repos = [folder for folder in base.parents if folder.name.startswith("models--")]
    return [base, *repos, *(repo.parent / "blobs" for repo in repos)]


def _check_shards(base: Path, path: Path, paths: Collection[Path]) -> None:
    shards = _read_object(base, path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{path} has no weight_map that names a file for every tensor. Fetch it again.")
    for shard in sorted(set(shards.values())):
        if path.parent / shard not in paths:
            raise ModelError(
                f"{path} names the file {shard!r}, which is not beside it. Fetch the file, or delete {path} if "
                "it belongs to weights that you left out."
            )


def _read_object(base: Path, path: Path) -> dict:
    try:
        content = read_json(base / path)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} of the model {base} can't be read: {error}. Fetch it again.") from error
    return content
