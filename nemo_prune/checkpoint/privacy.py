"""What a base's own files tell of the machine, the data and the captions that it was made with: it is not published.

Bytes are copied as they are unless something has to go; then the file is written without it, and the record says
which keys are gone, never what they said.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_prune.checkpoint.folder import INDEX_FILE
from nemo_prune.checkpoint.parts import PARTS
from nemo_prune.errors import ModelError
from nemo_prune.files.untrusted import read_json

PIPELINE_CLASS = "StableDiffusionPipeline"
_LOCAL_PATH = re.compile(r"~|/[^/\s]|[A-Za-z]:[\\/]|\\\\|file:|\.{1,2}[\\/]")
_OF_THE_DATA = re.compile(
    r"prompt|caption|dataset|data_(dir|root|path)|image_dir|train_data|tag_frequency", re.IGNORECASE
)
_NAMES = ("_name_or_path", "name_or_path")
# What they say is known to all.
_PUBLIC_NAMES = (
    "openai/clip-vit-large-patch14", "CompVis/stable-diffusion-safety-checker", "CompVis/stable-diffusion-v1-4",
    "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5",
)  # fmt: skip
# Vocabularies, in which anything is a token.
_NOT_CONFIGS = ("vocab.json", "tokenizer.json", "added_tokens.json")
# Of the metadata of a file; pictures are among the second.
_HARMLESS_METADATA = re.compile(r"format|modelspec\.\w+")
_PICTURES = ("modelspec.thumbnail",)
_OF_THE_TENSORS = ("modelspec.hash_sha256",)
_PLAIN_KEY = re.compile(r"[\w.:-]{1,64}", re.ASCII)


def cleaned_config(folder: Path, path: Path) -> tuple[dict, tuple[str, ...]] | None:
    """A config without what must not be published, and the keys that were dropped; None where nothing has to go.

    Args:
        folder: the model's.
        path: of the file, relative to it.

    Raises:
        ModelError: the file is damaged.
    """
    if path.suffix != ".json" or path.name in _NOT_CONFIGS or ".index." in path.name:
        return None
    try:
        content = read_json(folder / path)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} of the model {folder} can't be read: {error}. Fetch it anew.") from error
    if not isinstance(content, dict):
        return None
    dropped: list[str] = []
    cleaned = _cleaned(content, "", dropped)
    if path == Path(INDEX_FILE):
        cleaned = _of_the_pipeline(cleaned, dropped)
    return (cleaned, tuple(dropped)) if dropped else None


def cleaned_metadata(metadata: Mapping[str, str], tensors_changed: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """The metadata of a safetensors file without what must not be published, and the keys that were dropped.

    Args:
        metadata: of the base's file.
        tensors_changed: whether rows are pruned; then the hash of the tensors goes too.
    """
    kept = {
        key: value
        for key, value in metadata.items()
        if _HARMLESS_METADATA.fullmatch(key)
        and key not in _PICTURES
        and not (tensors_changed and key in _OF_THE_TENSORS)
        and not _LOCAL_PATH.match(value)
    }
    return kept, named_keys(key for key in metadata if key not in kept)


def named_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Keys for a record; one that is not a plain name is not shown."""
    return tuple(key if _PLAIN_KEY.fullmatch(key) else "(a key)" for key in keys)


def write_config(target: Path, content: Mapping) -> None:
    """Write a config that was cleaned."""
    target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(content: Mapping, where: str, dropped: list[str]) -> dict:
    kept = {}
    for key, value in content.items():
        name = f"{where}.{key}" if where else key
        if _must_go(key, value):
            dropped += named_keys([name])
        else:
            kept[key] = _cleaned(value, name, dropped) if isinstance(value, dict) else value
    return kept


def _must_go(key: str, value: object) -> bool:
    if key in _NAMES:
        return value not in _PUBLIC_NAMES
    if isinstance(value, str) and _LOCAL_PATH.match(value):
        return True
    return isinstance(value, str | list | dict) and bool(value) and _OF_THE_DATA.search(key) is not None


def _of_the_pipeline(index: dict, dropped: list[str]) -> dict:
    """The model_index.json of a release names only parts that it has, and a class that stock diffusers knows."""
    foreign = [name for name, kind in index.items() if isinstance(kind, list) and any(kind) and name not in PARTS]
    dropped += named_keys(foreign)
    kept = {name: value for name, value in index.items() if name not in foreign}
    if kept.get("_class_name") != PIPELINE_CLASS:
        dropped.append("_class_name")
        kept["_class_name"] = PIPELINE_CLASS
    return kept
