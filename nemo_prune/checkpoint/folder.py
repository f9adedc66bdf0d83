"""A checkpoint folder of unknown origin: which files are its own, and whether they fit together."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.checkpoint.parts import NOT_A_PART, why_left_out
from nemo_prune.errors import ModelError
from nemo_prune.files.layout import CARD_FILE, SAFETENSORS, is_licence_file
from nemo_prune.files.pointers import refuse_pointer
from nemo_prune.files.untrusted import read_json

INDEX_FILE = "model_index.json"
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


def scan_folder(base: Path) -> CheckpointFiles:
    """Scan a diffusers folder: what an export copies, and what it leaves out.

    Copied are model_index.json, licence texts, and of each part the files that stock loaders take, see
    :mod:`nemo_prune.checkpoint.parts`. Everything else stays behind: an unpruned twin of the weights under whatever
    name, another average, sample images, logs.

    Raises:
        ModelError: a file is damaged, missing, or outside of the folder; or a part that is not the U-Net is one.
    """
    copied, left_out = [], {}
    parts = component_names(base)
    for path in _files_of(base, parts):
        if len(path.parts) == 1:
            if _belongs_at_root(base / path):
                copied.append(path)
            # The base's card is replaced.
            elif path.name != CARD_FILE:
                left_out[path] = NOT_A_PART
        elif reason := NOT_A_PART if path.parts[0] not in parts else why_left_out(path):
            left_out[path] = reason
        else:
            copied.append(path)
    check_files(base, copied)
    return CheckpointFiles(base, tuple(sorted(copied)), dict(sorted(left_out.items())))


def _files_of(base: Path, parts: Collection[str]) -> Iterator[Path]:
    """Every file that is not hidden, relative to the folder; a link to a folder is followed for a part alone."""
    for entry in sorted(base.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and (entry.name in parts or not entry.is_symlink()):
            for folder, names, files in os.walk(entry):
                names[:] = sorted(name for name in names if not name.startswith("."))
                yield from (Path(folder, name).relative_to(base) for name in files)
        elif not entry.is_dir():
            yield entry.relative_to(base)


def _belongs_at_root(path: Path) -> bool:
    return path.is_file() and (path.name == INDEX_FILE or is_licence_file(path.name))


def read_model_index(base: Path) -> dict:
    """The parts of a diffusers folder, as its model_index.json names them.

    Raises:
        ModelError: it is missing or damaged.
    """
    return _read_object(base, Path(INDEX_FILE))


def component_classes(base: Path) -> dict[str, tuple[str, str]]:
    """Part -> library and class, of the parts that a diffusers folder has, sorted.

    Raises:
        ModelError: model_index.json is missing or damaged, names what is not a subfolder, or a second U-Net.
    """
    found = {}
    for name, kind in sorted(read_model_index(base).items()):
        if not isinstance(kind, list) or not any(kind):
            continue
        if len(kind) != 2 or not all(isinstance(each, str) for each in kind):
            raise ModelError(
                f"{INDEX_FILE} says {kind!r} of {name!r}, expected a library and a class, such as "
                '["diffusers", "UNet2DConditionModel"]. Correct it, or fetch it anew.'
            )
        if not _COMPONENT.fullmatch(name):
            raise ModelError(
                f"{INDEX_FILE} names the component {name!r}, which is not a name of a subfolder. Correct it."
            )
        if "UNet" in kind[1] and name != "unet":
            raise ModelError(
                f"{INDEX_FILE} names a second U-Net, `{name}` ({kind[1]}). It would be released unpruned. Delete its "
                f"folder and its line in {INDEX_FILE}, then try again."
            )
        found[name] = (kind[0], kind[1])
    return found


def component_names(base: Path) -> list[str]:
    """The subfolders that a diffusers folder consists of, sorted. Raises as :func:`component_classes`."""
    return list(component_classes(base))


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
            raise ModelError(f"{path} of the model {base} is not a file that can be read. Fetch the model anew.")
        refuse_pointer(real, path.as_posix())
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
                f"{path} names the file {shard!r}, which is not there beside it: a shard is missing. Fetch it, or "
                f"delete {path} if it belongs to weights that you left out."
            )


def _read_object(base: Path, path: Path) -> dict:
    try:
        content = read_json(base / path)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} of the model {base} can't be read: {error}. Fetch it again.") from error
    return content
