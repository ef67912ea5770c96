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
from miles.workers.compute import COMPUTE, compute_thread
from miles.workers.failure import without_plumbing
from miles.workers.garbage import settle, unsettle


class WorkerHost:
    """The objects of one process, by key."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.objects: dict[str, Any] = {}

    async def build(self, key: str, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Put `Target(rank, size, *args, **kwargs)` at a key."""
        self.objects[key] = await _compute(lambda: import_target(target)(self.rank, self.size, *args, **kwargs))
        settle()

    async def call(self, key: str, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a method of the object at a key returns."""
        bound = getattr(self.objects[key], method)
        if inspect.iscoroutinefunction(bound):
            return await bound(*args, **kwargs)
        return await _compute(partial(bound, *args, **kwargs))

    async def drop(self, key: str) -> None:
        """Forget an object, once the calls to it that were made before have ended."""
        await _compute(lambda: self.objects.pop(key, None))
        unsettle()

    async def pulse(self) -> None:
        """Returns when event loop and computing thread have both had a turn: neither of them hangs."""
        await _compute(lambda: None)

    async def stacks(self) -> str:
        """Where threads of the process stand, the one that computes first, idle ones left out: asked of a process that
        does not answer."""
        frames, this = sys._current_frames(), threading.current_thread()
        threads = sorted(threading.enumerate(), key=lambda thread: not thread.name.startswith(COMPUTE))
        stacks = {
            t.name: traceback.extract_stack(frames[t.ident]) for t in threads if t.ident in frames and t is not this
        }
        busy = {name: without_plumbing(stack) for name, stack in stacks.items()}
        return "\n".join(f"thread {name}:\n{''.join(stack.format())}" for name, stack in busy.items() if stack)


async def _compute(function: Callable[[], Any]) -> Any:
    """Whoever gives up waiting leaves the work in its place: the other ranks do theirs."""

    def work() -> Any:
        try:
            return function()
        except StopIteration as error:  # no future can hold it
            raise RuntimeError("StopIteration was raised") from error

    return await asyncio.shield(asyncio.get_running_loop().run_in_executor(compute_thread(), work))


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
