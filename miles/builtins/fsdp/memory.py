"""One exception for running out of memory, wherever it happened, and none of the tensors that did not fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIGNS = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")
"""What torch's other errors say when they mean that memory ran out."""


class OutOfMemoryOnRank(torch.OutOfMemoryError):
    """Raised by all ranks.

    Attributes:
        rank: which ran out of memory.
        alone: it worked on one sample, so that no smaller micro-batch can help.
        tokens: of its micro-batch; 0 where it was not at one.
    """

    def __init__(self, rank: int, alone: bool, tokens: int):
        super().__init__(f"out of memory on rank {rank}, at a micro-batch of {tokens} tokens")
        self.rank, self.alone, self.tokens = rank, alone, tokens


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
