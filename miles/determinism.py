"""Seeds and deterministic kernels, the same way in every process."""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    """`prepare_process` for as long as a job lasts; the caller then has its CPU threads and kernels again."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    prepare_process(run)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact, warn_only=only_warns)


def random_state() -> dict[str, Any]:
    """Of Python, numpy and torch on the CPU, as JSON can hold it."""
    numpys = np.random.get_state(legacy=False)
    numpys["state"] |= {"key": numpys["state"]["key"].tolist()}
    torchs = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    return {"python": random.getstate(), "numpy": numpys, "torch": torchs}


def set_random_state(state: Mapping[str, Any]) -> None:
    """What `random_state` said, as JSON gives it back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
