"""The one thread of this process that computes: trainer and engine take turns in it, and the event loop has its own.

An OpenMP runtime keeps a team for every thread that computes in parallel. As soon as the teams together have more
members than the machine has cores, libgomp no longer lets idle members spin between two parallel regions but puts them
to sleep, and waking one takes longer than a small operation: decoding with a small model slows down to half. So there
is one team, that of this thread, and a thread that asks for it gives its own share of the cores away.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

COMPUTE = "miles-compute"
"""Its name begins so."""


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=COMPUTE)


def compute_thread() -> ThreadPoolExecutor:
    """The thread, with as many torch threads as the caller has; the caller is left with one. It lives as long as the
    process, so nobody shuts it down."""
    thread, threads = _thread(), torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
        thread.submit(torch.set_num_threads, threads)
    return thread
