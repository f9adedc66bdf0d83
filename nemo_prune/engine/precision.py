"""Float32 in full: what is compared with a threshold must not be rounded on the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in full while the context lasts, without TensorFloat-32; also a decorator.

    By default torch lets convolutions round to 10 bits on GPUs that have it, which moves similarities.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
