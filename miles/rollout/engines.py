"""One front for all engines: decides which of them a request goes to, and counts what comes back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles.errors import EngineError, EngineLostError
from miles.protocols import RolloutEngine
from miles.rollout.recovery import Recovery
from miles.types import GenerateRequest, GenerateResult


@dataclass
class Traffic:
    """Counters since they were last taken."""

    seconds: float = 0.0
    """Wall time during which at least one request was in flight."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class EngineFront:
    """Generates through one of several engines; at most `concurrency` requests at once.

    Requests of one affinity go to one engine: siblings of a prompt find what they have in common in its cache. Which
    engine, their number decides and not the traffic, so that a run repeats itself. A request that a lost engine leaves
    behind goes to another, or waits for one.
    """

    closed, closings = False, 0
    """Only a `Gate` ever is."""

    def __init__(self, engines: Sequence[RolloutEngine], concurrency: int):
        self.engines = list(engines)
        self.traffic = Traffic()
        self.recovery = Recovery(engines)
        """Of a run: its own, which can bring back a lost engine."""
        self._in_flight = 0
        self._busy_since = 0.0
        self._slots = [asyncio.Semaphore(-(-concurrency // len(self.engines))) for _ in self.engines]
        self._counted: list[Mapping[str, float]] = [{}] * (len(self.engines) + 1)

    @property
    def generates(self) -> bool:
        return all(engine.generates for engine in self.engines)

    async def generate(self, request: GenerateRequest, affinity: int = 0) -> GenerateResult:
        """Raises:
        EngineLostError: no engine is left, and none can be brought back.
        EngineError: the request cannot be served.
        """
        while (result := await self._attempt(request, affinity)) is None:
            pass
        traffic = self.traffic
        traffic.prompt_tokens += len(request.tokens)
        traffic.cached_tokens += result.cached_tokens
        traffic.generated_tokens += len(result.tokens)
        return result

    async def _attempt(self, request: GenerateRequest, affinity: int) -> GenerateResult | None:
        """None when the engine was lost, before or meanwhile."""
        serving = self.recovery.serving()
        if not serving:
            await self.recovery.one_serving()
            return None
        index = affinity % len(self.engines)
        if index not in serving:
            index = serving[affinity % len(serving)]
        async with self._slots[index]:
            if index not in self.recovery.serving():
                return None
            life = self.recovery.lives[index]
            self._enter()
            try:
                return await self.engines[index].generate(request)
            except EngineLostError as error:
                self.recovery.lose(index, life, error)
                return None
            finally:
                self._leave()

    def _enter(self) -> None:
        if not self._in_flight:
            self._busy_since = time.perf_counter()
        self._in_flight += 1

    def _leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._count_seconds()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.traffic.seconds += now - self._busy_since
        self._busy_since = now

    async def abort(self) -> None:
        await asyncio.gather(*(engine.abort() for engine in self.engines))

    def take_traffic(self) -> Traffic:
        if self._in_flight:  # where they never stop, no end comes at which their time would be counted
            self._count_seconds()
        taken, self.traffic = self.traffic, Traffic()
        return taken

    async def take_counts(self) -> dict[str, float]:
        """What engines have counted since this was last asked (retries, time-outs), added up."""
        told = await asyncio.gather(*map(_counts, self.engines, self._counted))
        told.append({"restarts": self.recovery.restarts})
        new: Counter[str] = Counter()
        for counts, before in zip(told, self._counted, strict=True):
            # An engine that was started again may count from 0.
            new.update({name: float(max(count - before.get(name, 0), 0)) for name, count in counts.items()})
        self._counted = told
        return dict(new)


async def _counts(engine: RolloutEngine, before: Mapping[str, float]) -> Mapping[str, float]:
    """Those of now; those of `before` where it is lost, which whoever needs it finds out."""
    try:
        return (await engine.health()).counts
    except EngineError:
        return before
