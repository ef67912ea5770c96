"""Who holds the accelerator when.

Trainer and engines may share accelerators and take turns. Each phase of the loop asks for what it needs here, and the
moves happen in an order that keeps the peak low: optimizer and gradients leave before engine weights come, and the
KV cache comes last, when the trainer's parameters are gone too. Of several models the policy alone is needed for a
sync. Without offloading every phase is free.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from miles.protocols import EnginePart, RankPart, RolloutEngine, WorkerGroup
from miles.rollout.recovery import unless_lost
from miles.types import Metrics

WEIGHTS: frozenset[EnginePart] = frozenset({"weights"})
CACHE: frozenset[EnginePart] = frozenset({"kv_cache", "graphs"})
POLICY: frozenset[RankPart] = frozenset({"policy"})
TRAINING: frozenset[RankPart] = POLICY | {"other models", "gradients", "optimizer"}


class Residency:
    """Moves trainer and engines on and off the accelerator as the phases change, and times the phases."""

    def __init__(
        self, workers: WorkerGroup, engines: Sequence[RolloutEngine], offload_train: bool, offload_rollout: bool
    ):
        self.workers, self.engines = workers, engines
        self.offload_train, self.offload_rollout = offload_train, offload_rollout
        self.trainer_here = frozenset[RankPart]() if offload_train else TRAINING
        """A trainer that makes room has done so before the engines started."""
        self.engine_here: frozenset[EnginePart] = WEIGHTS | CACHE
        self.seconds: dict[str, float] = defaultdict(float)

    @asynccontextmanager
    async def rollout(self) -> AsyncIterator[None]:
        """Engines generate."""
        with self._timed("move"):
            await self._trainer(frozenset())
            await self._engine(WEIGHTS | CACHE)
        with self._timed("rollout"):
            yield

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """The trainer computes and saves."""
        with self._timed("move"):
            await self._engine(frozenset())
            await self._trainer(TRAINING)
        with self._timed("train"):
            yield

    @asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        """Weights go from trainer to engines; afterwards the engines are ready to generate."""
        with self._timed("move"):
            await self._engine(self.engine_here - CACHE)  # in the middle of a rollout it is there
            await self._trainer(POLICY)
            await self._engine(WEIGHTS)
        with self._timed("sync"):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    async def make_room(self) -> None:
        """For an engine that starts: it takes what it finds free."""
        await self._trainer(frozenset())

    async def settle(self, engine: RolloutEngine) -> None:
        """Bring an engine that has just started, all of it awake, to where the others are."""
        away = (WEIGHTS | CACHE) - self.engine_here
        if self.offload_rollout and away:
            await engine.sleep(away)

    def take_seconds(self) -> Metrics:
        """Seconds in each phase since this was last asked."""
        taken, self.seconds = self.seconds, defaultdict(float)
        return {f"perf/{phase}_time": seconds for phase, seconds in taken.items()}

    async def _trainer(self, wanted: frozenset[RankPart]) -> None:
        if not self.offload_train:
            return
        leaving, coming = self.trainer_here - wanted, wanted - self.trainer_here
        if leaving:
            await self.workers.call("offload", leaving)
        if coming:
            await self.workers.call("onload", coming)
        self.trainer_here = wanted

    async def _engine(self, wanted: frozenset[EnginePart]) -> None:
        if not self.offload_rollout:
            return
        leaving, coming = self.engine_here - wanted, wanted - self.engine_here
        if leaving:
            await asyncio.gather(*(unless_lost(engine.sleep(leaving)) for engine in self.engines))
        if coming:
            await asyncio.gather(*(unless_lost(engine.wake(coming)) for engine in self.engines))
        self.engine_here = wanted
