"""Ranks as forks of one process, which imports for all of them."""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=100)
"""After which a rank is taken to hang in a collective."""


def fork(work: Callable[..., None], *arguments) -> int:
    """`work` in a process of its own, which says what went wrong and ends; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        faulthandler.enable()
        torch.set_num_threads(1)
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo now and then abort a process that ends otherwise, when all is written


def wait(children: list[int]) -> None:
    """Until all are through, or one has failed: then none is left, nor is this process."""
    left = set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:
            for other in left:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            sys.exit(1)


def join(rank: int, size: int, meeting: Path) -> None:
    """The process group of gloo ranks that meet at a file."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
