"""Executor `inprocess`: the worker is an object in this process, and its methods run in a thread of their own.

One thread, always the same, so that the work of a rank is serialised and the event loop never waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from miles.api import ConfigError, import_target


class InProcessWorkers:
    """A worker group of one."""

    size = 1

    def __init__(self, worker: Any, thread: ThreadPoolExecutor):
        self.worker = worker
        self._thread = thread

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        function = getattr(self.worker, method)
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))]

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        (only,) = args
        return await self.call(method, *only)

    async def close(self) -> None:
        self._thread.shutdown(wait=True)


class InProcessExecutor:
    """Launches one worker; for more ranks there are executors with processes."""

    shares_process = True

    async def launch(self, target: str, size: int, *args: Any, **kwargs: Any) -> InProcessWorkers:
        if size != 1:
            raise ConfigError(
                f"resources.executor: inprocess runs one train rank, not {size}; lower --actor-num-gpus-per-node and "
                "--actor-num-nodes to 1, or choose another executor"
            )
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="miles-train")
        loop = asyncio.get_running_loop()
        worker = await loop.run_in_executor(thread, lambda: import_target(target)(0, size, *args, **kwargs))
        return InProcessWorkers(worker, thread)

    async def close(self) -> None:
        """Nothing is left to close: worker groups end their own thread."""
