"""Executor `inprocess`: the worker is an object in this process, and its methods run in the thread that computes.

Always the same thread, so that the work of a rank is serialised and the event loop never waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from miles.api import ConfigError, import_target
from miles.builtins.compute import compute_thread


class InProcessWorkers:
    """A worker group of one."""

    size = 1

    def __init__(self, worker: Any):
        self.worker = worker

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [await _compute(partial(getattr(self.worker, method), *args, **kwargs))]

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        (only,) = args
        return await self.call(method, *only)

    async def close(self) -> None:
        """A call that is under way ends first."""
        await _compute(lambda: None)


class InProcessExecutor:
    """Launches one worker; for more ranks there are executors with processes."""

    shares_process = True

    async def launch(self, target: str, size: int, *args: Any, **kwargs: Any) -> InProcessWorkers:
        if size != 1:
            raise ConfigError(
                f"resources.executor: inprocess runs one train rank, not {size}; lower --actor-num-gpus-per-node and "
                "--actor-num-nodes to 1, or choose another executor"
            )
        return InProcessWorkers(await _compute(lambda: import_target(target)(0, size, *args, **kwargs)))

    async def close(self) -> None:
        """Nothing is left to close: the thread that computes lives as long as the process."""


async def _compute(function: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(compute_thread(), function)
