"""An engine that has its answer ready: what is left is the time of our own code."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from simulated.engine import EngineOptions, SimulatedEngine

from miles.api import EngineContext, GenerateRequest, GenerateResult

LETTERS = 26


class InstantEngine(SimulatedEngine):
    """Says `max_new_tokens` tokens, the last of which ends the turn, when everybody else has had his turn."""

    def __init__(self, *, context: EngineContext):
        super().__init__(EngineOptions(), context=context)
        draw = random.Random(0)
        first = context.tokenizer.encode("a")[0]
        self.end = context.tokenizer.eos_token_id
        self.said = [first + draw.randrange(LETTERS) for _ in range(100_000)]
        self.log_probs = [-draw.random() for _ in self.said]

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        await asyncio.sleep(0)
        count = request.sampling.max_new_tokens
        start = request.seed % (len(self.said) - count)
        tokens = [*self.said[start : start + count - 1], self.end]
        return GenerateResult(tokens, self.log_probs[start : start + count], "stop", [self.version] * count)

    async def abort(self, request_id: str | None = None) -> None:
        """Nothing runs for long."""

    async def pause(self, mode: Any = "retract") -> None:
        """The same."""

    async def resume(self) -> None:
        """The same."""

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        self.version = version
