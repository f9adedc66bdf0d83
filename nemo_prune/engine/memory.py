"""Memory that runs short on a device: told from other failures, and answered with less at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from nemo_prune.errors import ModelError

Result = TypeVar("Result")
# What libraries say whose failures have no class of their own, in lower case. A handle of cuBLAS or cuDNN that can't
# be made, too, is nearly always a matter of memory.
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "cudnn_status_not_initialized",
    "cudnn_status_internal_error_device_allocation_failed",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: of CUDA, cuBLAS, cuDNN, MPS or the processor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error).lower() for each in _MESSAGES)


def release_memory() -> None:
    """Give cached memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def with_less_at_once(do: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """Do something with as much at once as memory takes.

    Args:
        do: what is done, given how much of it at once.
        size: how much is tried first; it is halved where memory is short.
        what: what is done, for the error: "predicting".

    Returns:
        The result, and the size that was taken.

    Raises:
        ModelError: memory does not take a single one.
    """
    while True:
        try:
            return do(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise memory_error(what) from error
        # Outside of the handler: the error's traceback holds the tensors of the attempt.
        release_memory()
        size //= 2


def in_parts(do: Callable[[slice], Result], number: int, at_once: int, what: str) -> Iterator[Result]:
    """Do something for all samples, as many at once as memory takes.

    Args:
        do: what is done for a part of the samples.
        number: of all samples.
        at_once: how many are tried first.
        what: what is done, for the error.

    Yields:
        The results of the parts, in their order.

    Raises:
        ModelError: memory does not take a single one.
    """
    done = 0

    def take(size: int) -> Result:
        return do(slice(done, done + size))

    while done < number:
        result, at_once = with_less_at_once(take, min(at_once, number - done), what)
        yield result
        done += at_once


@contextmanager
def named_shortage(what: str) -> Iterator[None]:
    """Turn a failure for want of memory into an error that says what helps.

    Raises:
        ModelError: memory is short.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory()
        raise memory_error(what) from error


def memory_error(what: str) -> ModelError:
    """The error for memory that is short even for the least."""
    return ModelError(
        f"The device's memory is too short for {what}. Close other programs that use it, try another --dtype, or use "
        "another --device, such as cpu. The same command goes on from what was found."
    )
