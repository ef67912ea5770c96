"""The other side of a simulated run: a trainer on a device of its own, and the way of the weights to the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulated.trace import Step, Trace

from miles.api import ExecutorContext, Group, Metrics, RolloutEngine, SyncContext, WorkerGroup
from miles.training.worker import DataShare


class SimulatedExecutor:
    """One train rank, which holds nothing."""

    shares_process = True

    def __init__(self, *, context: ExecutorContext):
        """It needs no seats."""

    async def launch(self, name: str, target: str, *args: Any, **kwargs: Any) -> SimulatedRank:
        return SimulatedRank()

    async def close(self) -> None:
        """Nothing was started."""


class SimulatedRank:
    """A `WorkerGroup` that does at once whatever it is asked."""

    size, address = 1, "127.0.0.1"

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method == "save":
            Path(args[0], "nothing").touch()
        return [DataShare(part=0, together=False) if method == "data_share" else None]

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        return await self.call(method, *args[0])

    async def call_one(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        return (await self.call(method, *args, **kwargs))[0]

    async def beside(self, name: str, target: str, *args: Any, **kwargs: Any) -> SimulatedRank:
        return SimulatedRank()

    async def close(self) -> None:
        """Nothing was started."""


@dataclass
class SyncOptions:
    seconds: float = 1.0
    """From trainer to engines."""


class SimulatedSync:
    """Weights that take their time. While they travel the trainer waits; engines do what they were told to."""

    transport = "simulated"

    def __init__(self, options: SyncOptions, *, context: SyncContext):
        self.options = options
        self.engines: Sequence[RolloutEngine] = ()

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        self.engines = engines

    async def push(self, version: int) -> Metrics:
        await asyncio.sleep(self.options.seconds)
        for engine in self.engines:
            await engine.receive(self.transport, version, None)
        return {}


class SimulatedTrainer:
    """Stands where a run has its `Trainer`: a step takes a fixed time, whatever is in the batch."""

    def __init__(self, seconds: float, trace: Trace):
        self.seconds, self.trace = seconds, trace
        self.learned: dict[int, dict[str, Any]] = {}

    async def step(self, groups: Sequence[Group]) -> Metrics:
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(self.seconds)
        self.trace.steps.append(Step.of(started, asyncio.get_running_loop().time(), groups))
        return {"perf/workers_time": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": len(self.trace.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The trace is not part of a checkpoint."""


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, trace: Trace):
        self.trace = trace

    def start(self, info: Any) -> None:
        """Nothing to prepare."""

    def log(self, step: int, metrics: Metrics) -> None:
        self.trace.metrics.append(dict(metrics))

    def finish(self, status: str) -> None:
        """Nothing is open."""
