"""Weights in torch's own format (.ckpt, .bin): read without running any code in them."""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_prune.errors import ModelError
from nemo_prune.files.pointers import refuse_pointer

# Training programs leave objects of these packages beside the weights: settings, paths, numbers.
_LEFT_BY_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "numpy", "argparse", "pathlib", "omegaconf")
_MOST_STUBS = 100
# What torch, pickle and zipfile raise at bytes that make no sense to them.
_DAMAGED = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    EOFError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
# Of a zip archive and of a pickle, as torch writes them.
_BEGINNINGS = (b"PK", b"\x80")
# Where training programs keep the weights, the likeliest first; copies by averages come last.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "network", "net", "unet")
_AVERAGES = re.compile(r"(^|[^a-z])ema([^a-z]|$)|averag|shadow", re.IGNORECASE)
_MOST_DEPTH = 4
_SHOWABLE = re.compile(r"[\w.-]{1,60}", re.ASCII)


@dataclass(frozen=True)
class PickledWeights:
    """The named tensors of a file that torch saved.

    Attributes:
        tensors: by name; large ones stay on disk until they are used.
        wrapper: the key that they lie under, such as ``model`` or ``module.state_dict``; None where they are the file's
            own content.
        others: further keys with about as many tensors -> how many; they are not read.
    """

    tensors: dict[str, torch.Tensor]
    wrapper: str | None = None
    others: Mapping[str, int] = field(default_factory=dict)


def read_pickled(path: Path) -> PickledWeights:
    """The weights in a file that torch saved.

    The file is a pickle, which can hold programs. Only tensors and plain values are made; objects that trainers leave,
    of Lightning, NumPy and argparse among others, become empty stubs; anything else is refused.

    Args:
        path: names and tensors, or a training state that has them under a key such as ``state_dict`` or ``model``.

    Raises:
        ModelError: the file is damaged, wants more than tensors, holds none, or several sets of equal standing.
    """
    try:
        refuse_pointer(path, path.name)
        with path.open("rb") as file:
            if not file.read(2).startswith(_BEGINNINGS):
                raise ValueError("it begins like neither a zip archive nor a pickle")
        content = _loaded(path)
    except pickle.UnpicklingError as error:
        wanted = _refused_name(error)
        what = (
            f"wants to run `{wanted}`, which weights don't need and malware does"
            if wanted
            else "holds more than tensors"
        )
        raise ModelError(f"{path.name} was not read: it {what}. Give the safetensors of this model.") from error
    except _DAMAGED as error:
        raise ModelError(f"{path.name} is not a file of torch's, or is damaged: {error}. Fetch it anew.") from error
    return _chosen(path, _named_tensors(content))


def _loaded(path: Path) -> object:
    """The content of a file; stubs stand for what trainers left."""
    is_zip = zipfile.is_zipfile(path)
    stubs: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals(list(stubs.values())):
                # Only the newer, zipped format can be mapped.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            wanted = _refused_name(error)
            is_left = wanted is not None and wanted.partition(".")[0] in _LEFT_BY_TRAINERS
            if not is_left or wanted in stubs or len(stubs) == _MOST_STUBS:
                raise
            stubs[wanted] = _stub(wanted)


def _refused_name(error: pickle.UnpicklingError) -> str | None:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else None


def _named_tensors(content: object) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    """Keys that lead to a mapping with named tensors -> these tensors."""
    found: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    level: list[tuple[tuple[str, ...], object]] = [((), content)]
    seen: set[int] = set()
    for _ in range(_MOST_DEPTH):
        level = [(keys, each) for keys, each in level if isinstance(each, Mapping) and id(each) not in seen]
        seen |= {id(each) for _, each in level}
        named = [(keys, {name: value for name, value in each.items() if isinstance(name, str)}) for keys, each in level]
        for keys, values in named:
            if tensors := {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}:
                found[keys] = tensors
        level = [((*keys, name), value) for keys, values in named for name, value in values.items()]
    return found


def _chosen(path: Path, found: Mapping[tuple[str, ...], dict[str, torch.Tensor]]) -> PickledWeights:
    """The likeliest of several sets of tensors."""
    if not found:
        raise ModelError(f"{path.name} holds no named tensors: it is not a checkpoint. Give the weights of the model.")
    # Beside the weights there are counters, and what an optimizer keeps.
    most = max(map(len, found.values()))
    large = sorted((keys for keys in found if 2 * len(found[keys]) >= most), key=_likelihood)
    if len(large) > 1 and _likelihood(large[0]) == _likelihood(large[1]):
        raise ModelError(
            f"{path.name} holds several sets of weights: {', '.join(map(_shown, large))}. Save the one to prune alone, "
            "as safetensors."
        )
    first, *others = large
    return PickledWeights(
        found[first], _shown(first) if first else None, {_shown(keys): len(found[keys]) for keys in others}
    )


def _likelihood(keys: tuple[str, ...]) -> tuple[bool, int]:
    """Sorts first what is likelier to be the plain weights."""
    is_average = any(map(_AVERAGES.search, keys))
    if not keys:
        return is_average, -1
    # The outermost known key counts: `model` in {"model": {"state_dict": ...}}.
    places = [_WRAPPERS.index(key) for key in keys if key in _WRAPPERS]
    return is_average, places[0] if places else len(_WRAPPERS)


def _shown(keys: tuple[str, ...]) -> str:
    """Keys of a file of unknown origin, fit for a message and a card."""
    shown = ".".join(keys)
    return shown if _SHOWABLE.fullmatch(shown) else "a key with other characters"


def _stub(name: str) -> type:
    """An empty class under a name: it accepts any state that the pickle gives its objects, and does nothing."""
    module, _, attribute = name.rpartition(".")

    def ignore(self: object, *arguments: object) -> None:
        """Do nothing."""

    members = {"__module__": module, "__qualname__": attribute, "__init__": ignore, "__setstate__": ignore}
    return type(attribute, (), members)
