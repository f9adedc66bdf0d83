"""Weights in torch's own format (.ckpt, .bin): read without running any code in them."""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_prune.errors import ModelError

# Training programs leave objects of these packages beside the weights.
_LEFT_BY_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric", "numpy")
# What torch, pickle and zipfile raise on invalid bytes.
_DAMAGED = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    EOFError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_MODEL_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved; large ones stay on disk until they are used.

    The file is a pickle, which can hold programs. Only tensors and plain values are made; objects of Lightning, the
    usual trainer, and of NumPy become empty stubs; anything else is refused.

    Args:
        path: names and tensors, or a training state that has them under ``state_dict``.

    Raises:
        ModelError: the file is damaged, contains more than tensors, or holds none.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else [_MODEL_CHECKPOINT]
        stubs = [_stub(name) for name in wanted if name.partition(".")[0] in _LEFT_BY_TRAINERS]
        with torch.serialization.safe_globals(stubs):
            # Only the newer, zipped format can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run `{found[1]}`" if found else "it holds more than tensors"
        raise ModelError(
            f"{path.name} was not read: {what}, which weights never need but malware does. Give the safetensors of "
            "this model."
        ) from error
    except _DAMAGED as error:
        raise ModelError(
            f"{path.name} is not a file saved by torch, or is damaged: {error}. Fetch it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path.name} holds no named tensors, so it is not a checkpoint. Give another file.")
    return tensors


def _stub(name: str) -> type:
    """An empty class under a name: it accepts any state that the pickle gives its objects, and does nothing."""
    module, _, attribute = name.rpartition(".")

    def ignore(self: object, *arguments: object) -> None:
        """Do nothing."""

    members = {"__module__": module, "__qualname__": attribute, "__init__": ignore, "__setstate__": ignore}
    return type(attribute, (), members)
