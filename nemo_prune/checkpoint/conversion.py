"""Checkpoints in other forms, converted to what everything works on: a diffusers folder with safetensors weights.

A conversion changes no value. It is kept in the cache folder under the sha256 of its source, appears there whole or
not at all, and is used again the next time.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from nemo_prune.checkpoint.architecture import expected_shapes
from nemo_prune.checkpoint.folder import INDEX_FILE, CheckpointFiles, check_files, component_names, read_model_index
from nemo_prune.checkpoint.ldm_names import EMA_PREFIX, full_name, ldm_names, refuse_other_families
from nemo_prune.checkpoint.parts import publicly_named
from nemo_prune.checkpoint.single_file import read_tensors, read_weights
from nemo_prune.checkpoint.tensors import TensorBytes, write_tensors
from nemo_prune.checkpoint.weights import WeightsFile, loaded_weights, refuse_missing_shards, weights_files
from nemo_prune.errors import ModelError, OutputError
from nemo_prune.files.cache import cache_folder
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import CARD_FILE, SAFETENSORS, has_ending
from nemo_prune.files.locks import waiting_lock
from nemo_prune.files.staging import staged_folder, writing
from nemo_prune.files.untrusted import read_json

# Part of the key: results of another version of the conversion are not found.
_VERSION = 1
_NOTE_FILE = "conversion.json"
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_FROM_CONFIG = (*_WEIGHTS, "tokenizer", "scheduler")
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class Conversion:
    """A diffusers folder that was made from another form.

    Attributes:
        folder: where it is.
        converted: what was converted, in words.
        left_out: what is not in the folder -> why.
    """

    folder: Path
    converted: str
    left_out: dict[str, str] = field(default_factory=dict)


def convert_single_file(file: Path, config: CheckpointFiles) -> Conversion:
    """A single file of SD 1.x as a diffusers folder.

    Args:
        file: .safetensors or .ckpt.
        config: the files of a diffusers folder of the same architecture; its configs, tokenizer and scheduler are
            taken, its weights are not.

    Raises:
        ModelError: the file is damaged, of another family, or does not fit the config.
        OutputError: the cache can't be written.
    """
    kept = [path for path in config.kept if path.parts[0] in _FROM_CONFIG and not _of_weights(path)]
    index = _index_of_parts(config.folder)

    def convert(folder: Path) -> Conversion:
        weights = read_weights(file)
        tensors = weights.tensors
        refuse_other_families(tensors)
        _copy(config.folder, kept, folder)
        used: set[str] = set()
        for component, name in _WEIGHTS.items():
            shapes = expected_shapes(config.folder, component)
            found = _find(component, shapes, tensors)
            (folder / component).mkdir(exist_ok=True)
            write_tensors(
                folder / component / name,
                {name: replace(tensors[there], shape=shapes[name]) for name, there in found.items()},
            )
            used.update(found.values())
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
        where = f", its weights under `{weights.wrapper}`" if weights.wrapper else ""
        left_out = _left_out(tensors.keys() - used) | {
            f"{name}.*": f"{number} tensors beside the weights" for name, number in weights.others.items()
        }
        return Conversion(folder, f"a single-file checkpoint ({file.suffix.lower()}{where})", left_out)

    return _kept(["single file", file_hash(file), index, _hashes(config.folder, kept)], convert)


def pickled_weights(base: CheckpointFiles, variant: str | None) -> dict[str, list[WeightsFile]]:
    """Part -> its ``.bin`` files that a loader would take, because there are no safetensors of them.

    Raises:
        ModelError: a shard of them is missing.
    """
    found = {}
    for component in component_names(base.folder):
        files = loaded_weights(weights_files(base, component), variant)
        if files and not files[0].is_safetensors:
            refuse_missing_shards(component, files)
            found[component] = files
    return found


def convert_pickled(base: CheckpointFiles, pickled: Mapping[str, list[WeightsFile]]) -> Conversion:
    """A diffusers folder whose ``.bin`` weights are safetensors; everything else is copied.

    Args:
        base: the files of the folder.
        pickled: see :func:`pickled_weights`; the shards of a component become one file.

    Raises:
        ModelError: a file is damaged, or contains more than tensors.
        OutputError: the cache can't be written.
    """
    kept = [*base.kept, *([Path(CARD_FILE)] if (base.folder / CARD_FILE).is_file() else [])]
    bins = [each.path for files in pickled.values() for each in files]
    check_files(base.folder, kept + bins)

    def convert(folder: Path) -> Conversion:
        _copy(base.folder, kept, folder)
        why = publicly_named(base.left_out)
        for component, files in pickled.items():
            target = Path(component, files[0].converted_name)
            tensors: dict[str, TensorBytes] = {}
            for each in files:
                tensors |= read_tensors(base.folder / each.path)
                why[each.path.as_posix()] = f"converted to {target.as_posix()}"
            write_tensors(folder / target, tensors)
        return Conversion(folder, f"the .bin weights of {', '.join(pickled)}", why)

    return _kept(["bin", _hashes(base.folder, kept + bins), sorted(map(str, base.left_out))], convert)


def _kept(key: list, convert: Callable[[Path], Conversion]) -> Conversion:
    """What is in the cache under a key, made if it is not there."""
    digest = sha256(json.dumps([_VERSION, *key]).encode()).hexdigest()
    folder = cache_folder() / "converted" / digest[:32]
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder.with_suffix(".lock")):
            if not (folder / _NOTE_FILE).is_file():
                with staged_folder(folder, overwrite=True) as staged:
                    made = convert(staged)
                    note = {"converted": made.converted, "left_out": made.left_out}
                    (staged / _NOTE_FILE).write_text(json.dumps(note, indent=2), encoding="utf-8")
    except OutputError as error:
        raise OutputError(f"The model can't be converted: {error} The cache is under XDG_CACHE_HOME.") from error
    return Conversion(folder, **read_json(folder / _NOTE_FILE))


def _find(component: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorBytes]) -> dict[str, str]:
    """Name in a folder -> name in the file, for all tensors that a component has."""
    names, there = ldm_names(component, shapes), {full_name(name): name for name in tensors}
    found = {name: there[ldm_name] for name, ldm_name in names.items() if ldm_name in there}
    missing = [names[name] for name in shapes if name not in found]
    if missing:
        raise ModelError(
            f"The single file lacks {len(missing)} of the {len(names)} tensors of the {component}, the first is "
            f"`{missing[0]}`. Give a whole checkpoint, or a --config of its own architecture."
        )
    for name, in_file in found.items():
        if _without_ones(tensors[in_file].shape) != _without_ones(shapes[name]):
            raise ModelError(
                f"`{in_file}` has the shape {list(tensors[in_file].shape)} in the single file, expected "
                f"{list(shapes[name])}. Give a --config of its own architecture."
            )
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a matrix are the same bytes."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _left_out(names: Iterable[str]) -> dict[str, str]:
    """What has no place in a folder, in few words: a training run leaves hundreds of tensors."""
    names = sorted(names)
    averages = [name for name in names if name.startswith(EMA_PREFIX)]
    others = [name for name in names if not name.startswith(EMA_PREFIX)]
    found = {}
    if averages:
        found[f"{EMA_PREFIX}*"] = f"the moving averages (EMA) of {len(averages)} tensors; the plain weights are used"
    for name in others[:_SHOWN_NAMES]:
        found[name] = "not a tensor of the pipeline"
    if len(others) > _SHOWN_NAMES:
        found[f"{len(others) - _SHOWN_NAMES} other tensors"] = "not tensors of the pipeline"
    return found


def _index_of_parts(config: Path) -> dict:
    """The model_index.json of a pipeline with the components of a single file."""
    index = read_model_index(config)
    dropped = {name: [None, None] for name, kind in index.items() if isinstance(kind, list)}
    kept = {name: index[name] for name in _FROM_CONFIG if name in index}
    return {**index, **dropped, **kept, "requires_safety_checker": False}


def _of_weights(path: Path) -> bool:
    return has_ending(path, SAFETENSORS) or ".index." in path.name


def _hashes(base: Path, paths: Iterable[Path]) -> list[list[str]]:
    return [[path.as_posix(), file_hash(base / path)] for path in paths]


def _copy(base: Path, paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / path, folder / path)
