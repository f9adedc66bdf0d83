"""Weights in torch's own format (.ckpt, .bin): read without running anything that they hold."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_prune.errors import ModelError

# Training programs leave objects of these packages beside the weights.
_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric")
_MODEL_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved; large ones stay on disk until they are used.

    The file is a pickle, which can hold programs. Only tensors and plain values are made; objects of Lightning, the
    usual trainer, become empty stubs; anything else is refused.

    Args:
        path: names and tensors, or a training state that has them under ``state_dict``.

    Raises:
        ModelError: the file is damaged, wants more than tensors, or holds none.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else [_MODEL_CHECKPOINT]
        stubs = [_stub(name) for name in wanted if name.partition(".")[0] in _TRAINERS]
        with torch.serialization.safe_globals(stubs):
            # Only the newer, zipped format can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run `{found[1]}`" if found else "it holds more than tensors"
        raise ModelError(
            f"{path.name} was not read: {what}, which weights don't need and malware does. Give the safetensors of "
            "this model."
        ) from error
    except (EOFError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise ModelError(f"{path.name} is no file of torch's, or is damaged: {error}. Fetch it anew.") from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path.name} holds no named tensors, so that it is no checkpoint.")
    return tensors


def _stub(name: str) -> type:
    """An empty class under a name: what the pickle says of its objects is kept, nothing of it runs."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (), {"__module__": module, "__qualname__": attribute})
