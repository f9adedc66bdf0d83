"""Tensors that a run computes once and keeps in its work folder."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_magic, write_array_header_1_0
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_prune.files.staging import staged_file, writing


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


def kept_rows(path: Path | None, number: int, make: Callable[[int], Iterator[Tensor]]) -> Tensor:
    """Rows of a tensor that is larger than memory: kept as they come, then mapped from their file.

    After a stop they are made from the first one on that is missing.

    Args:
        path: a .npy file; None keeps the rows in memory.
        number: of the rows, at least 1.
        make: computes the rows from a place on, some at a time, [n, ...].

    Returns:
        [number, ...], float32, on the CPU; of what is mapped only what is read takes memory.

    Raises:
        OutputError: the file can't be written.
    """
    if path is None:
        return torch.cat([rows.cpu().float() for rows in make(0)])
    done = _rows_in(path, number)
    for rows in make(done) if done < number else ():
        values = rows.detach().cpu().float().numpy()
        with writing(path), path.open("ab") as file:
            if not file.tell():
                header = {"descr": "<f4", "fortran_order": False, "shape": (number, *values.shape[1:])}
                write_array_header_1_0(file, header)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        _give_back_memory()
    # Copied where it is written to, which is nowhere: torch has no tensors that can't be.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _give_back_memory() -> None:
    """Give free memory back to the system: glibc keeps it, some 700 MB after a thousand captions of SD v1-4."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _rows_in(path: Path, number: int) -> int:
    """How many rows of a file are whole; what a kill left of another one is cut off, and a damaged file removed."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        try:
            read_magic(file)
            shape, _, dtype = read_array_header_1_0(file)
        except ValueError:
            shape, dtype = (), np.dtype("<f4")
        began, size = file.tell(), os.fstat(file.fileno()).st_size
        if len(shape) > 1 and shape[0] == number:
            row = dtype.itemsize * int(np.prod(shape[1:]))
            done = min(number, (size - began) // row)
            file.truncate(began + done * row)
            return done
    path.unlink()
    return 0
