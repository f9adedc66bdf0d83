"""Tensors that a run computes once and keeps in its work folder."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_prune.files.staging import staged_file


def kept_tensors(path: Path | None, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from their file, on the CPU; computed and kept where there is none, or a damaged one.

    Args:
        path: a safetensors file; None keeps nothing.
        make: computes them.

    Raises:
        OutputError: the file can't be written.
    """
    if path is not None and path.exists():
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink()
    made = {name: values.detach().cpu().contiguous() for name, values in make().items()}
    if path is not None:
        with staged_file(path) as partial:
            save_file(made, partial)
    return made
