"""One exception for running out of memory, wherever it happened, and none of the tensors that did not fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIGNS = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")
"""What torch's other errors say when they mean that memory ran out."""


@contextmanager
def one_out_of_memory_error() -> Iterator[None]:
    """Turns every kind of memory failure into `torch.OutOfMemoryError`.

    The frames between here and the failure are emptied, so that the activations they hold are free for a retry even
    while the exception is being handled.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not means_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(str(error) or "out of memory") from error


def means_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(sign in str(error) for sign in SIGNS)
