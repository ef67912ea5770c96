"""One front for all engines: decides which of them a request goes to, and counts what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from miles.protocols import RolloutEngine
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
    engine, their number decides and not the traffic, so that a run repeats itself.
    """

    def __init__(self, engines: Sequence[RolloutEngine], concurrency: int):
        self.engines = list(engines)
        self.traffic = Traffic()
        self._in_flight = 0
        self._busy_since = 0.0
        self._slots = [asyncio.Semaphore(-(-concurrency // len(self.engines))) for _ in self.engines]

    @property
    def generates(self) -> bool:
        return all(engine.generates for engine in self.engines)

    async def generate(self, request: GenerateRequest, affinity: int = 0) -> GenerateResult:
        index = affinity % len(self.engines)
        async with self._slots[index]:
            self._enter()
            try:
                result = await self.engines[index].generate(request)
            finally:
                self._leave()
        traffic = self.traffic
        traffic.prompt_tokens += len(request.tokens)
        traffic.cached_tokens += result.cached_tokens
        traffic.generated_tokens += len(result.tokens)
        return result

    def _enter(self) -> None:
        if not self._in_flight:
            self._busy_since = time.perf_counter()
        self._in_flight += 1

    def _leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self.traffic.seconds += time.perf_counter() - self._busy_since

    async def abort(self) -> None:
        await asyncio.gather(*(engine.abort() for engine in self.engines))

    def take_traffic(self) -> Traffic:
        taken, self.traffic = self.traffic, Traffic()
        return taken
