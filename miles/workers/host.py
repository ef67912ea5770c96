"""A worker process from the inside: the objects that live in it, and how their methods run.

Plain methods run one after the other in the thread that computes. Coroutine methods run in the process's event loop,
beside each other: an engine answers hundreds of requests while a train rank works. What crosses to a process is target
strings (`package.module:Class`), names and data; never a pickled function.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from miles.targets import import_target
from miles.workers.compute import compute_thread


class WorkerHost:
    """The objects of one process, by key."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._objects: dict[str, Any] = {}

    async def build(self, key: str, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Put `Target(rank, size, *args, **kwargs)` at a key."""
        self._objects[key] = await _compute(lambda: import_target(target)(self.rank, self.size, *args, **kwargs))

    async def call(self, key: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a method of the object at a key returns."""
        bound = getattr(self._objects[key], method)
        if inspect.iscoroutinefunction(bound):
            return await bound(*args, **kwargs)
        return await _compute(partial(bound, *args, **kwargs))

    async def drop(self, key: str) -> None:
        """Forget an object, once the calls to it that were made before have ended."""
        await _compute(lambda: self._objects.pop(key, None))

    async def stacks(self) -> str:
        """Where each thread of the process stands: asked of one that does not answer."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(f"thread {names.get(i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


async def _compute(function: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(compute_thread(), function)


def torchrun_environment(
    rank: int, size: int, local_rank: int, local_size: int, host: str, port: int
) -> dict[str, str]:
    """What torchrun would tell a process, so that `init_process_group` needs no arguments. The store at `host:port` is
    the driver's, which lives as long as any worker."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
