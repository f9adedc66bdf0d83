"""A checkpoint folder of unknown origin: which files are its own, and whether they fit together."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from nemo_prune.errors import ModelError
from nemo_prune.files.untrusted import read_json

INDEX_FILE = "model_index.json"
_COMPONENT = re.compile(r"\w[\w-]*", re.ASCII)
_SHARD_INDEX = re.compile(r".+\.safetensors\.index\.(.+\.)?json")


def read_model_index(base: Path) -> dict:
    """The parts of a diffusers folder, as its model_index.json names them.

    Raises:
        ModelError: it is missing or damaged.
    """
    return _read_object(base, Path(INDEX_FILE))


def component_names(base: Path) -> list[str]:
    """The subfolders that a diffusers folder consists of, sorted.

    Raises:
        ModelError: model_index.json is missing or damaged, or names what is no subfolder.
    """
    index = read_model_index(base)
    names = sorted(name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0])
    for name in names:
        if not _COMPONENT.fullmatch(name):
            raise ModelError(f"{INDEX_FILE} names the component {name!r}, which is no name of a subfolder. Mend it.")
    return names


def check_files(base: Path, paths: Collection[Path]) -> None:
    """Refuse files that lie outside of their folder or are no files, and shards that are not all there.

    Links are followed within the folder and, for a snapshot in the cache of the Hub's client, to where that keeps
    its files: the folder of the repo, and the store that all repos share.

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
                f"{path} of the model {base} is a link to {real}, which lies outside of it. Copy the model with what "
                f"its links lead to, `cp -rL {base} COPY`, and give the copy."
            )
        # A pipe or a device would be read without end.
        if not real.is_file() or not os.access(real, os.R_OK):
            raise ModelError(f"{path} of the model {base} is no file that can be read. Fetch the model anew.")
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
        raise ModelError(f"{path} has no weight_map that names a file for every tensor. Fetch it anew.")
    for shard in sorted(set(shards.values())):
        if path.parent / shard not in paths:
            raise ModelError(
                f"{path} names the file {shard!r}, which is not there beside it. Fetch the file, or delete {path} if "
                "it belongs to weights that you left out."
            )


def _read_object(base: Path, path: Path) -> dict:
    try:
        content = read_json(base / path)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} of the model {base} can't be read: {error}. Fetch it anew.") from error
    return content
