"""Executor `inprocess`: the worker is an object in this process, and its methods run in the thread that computes.

Always the same thread, so that the work of a rank is serialised and the event loop never waits for it.
"""

from __future__ import annotations

from typing import Any

from miles.api import ConfigError, ExecutorContext
from miles.toolkit import DirectLink, WorkerHost, Workers


class InProcessExecutor:
    """Launches one worker; for more ranks there are executors with processes."""

    shares_process = True

    def __init__(self, *, context: ExecutorContext):
        self.context = context

    async def launch(self, name: str, target: str, *args: Any, **kwargs: Any) -> Workers:
        size = self.context.seats[name].workers
        if size != 1:
            raise ConfigError(
                f"resources.executor: inprocess runs one train rank, not {size}; lower --actor-num-gpus-per-node and "
                "--actor-num-nodes to 1, or choose another executor"
            )
        links = [DirectLink(WorkerHost(0, size))]
        group = Workers(name, links, address="127.0.0.1", timeout=None)
        return await Workers.build(group, target, args, kwargs)

    async def close(self) -> None:
        """Nothing is left to close: the thread that computes lives as long as the process."""
