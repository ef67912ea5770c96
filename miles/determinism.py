"""Seeds and deterministic kernels, the same way in every process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from miles.config.run import RunSection


def prepare_process(run: RunSection, rank: int = 0) -> None:
    """Seed Python, numpy and torch, set the number of CPU threads, and ask for deterministic kernels if wanted."""
    seed = run.seed + rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@contextmanager
def prepared_process(run: RunSection) -> Iterator[None]:
    """`prepare_process` for as long as a job lasts; the caller then has the CPU threads again that it had."""
    threads = torch.get_num_threads()
    prepare_process(run)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
