"""The way of training rollouts to the engines, which can be closed. Evaluation has a front of its own beside it: it
does not queue behind them, and its tokens are counted apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from miles.protocols import PauseMode, RolloutEngine
from miles.rollout.engines import EngineFront
from miles.rollout.recovery import unless_lost
from miles.types import GenerateRequest, GenerateResult

BETWEEN_ABORTS = 0.005
"""Seconds in which requests that waited for a place come to the engines."""


class Gate(EngineFront):
    """While it is closed, whoever asks is answered at once: aborted, no token. So a rollout that is in the middle of
    something else, a tool that takes its time, ends at its next turn, with all that it has."""

    def __init__(self, engines: Sequence[RolloutEngine], concurrency: int):
        super().__init__(engines, concurrency)
        self._aborting = False
        """From a pause that aborts to its end: what comes in between may be aborted as well."""
        self._interruptions = 0
        """Times that this began or ended."""
        self._inside = 0

    async def generate(self, request: GenerateRequest, affinity: int = 0) -> GenerateResult:
        """As `EngineFront.generate`."""
        if self.closed:
            return GenerateResult([], [], "abort", [])
        self._inside += 1
        before = self._interruptions
        try:
            result = await super().generate(request, affinity)
        finally:
            self._inside -= 1
        ours = self._aborting or before != self._interruptions
        result.interrupted = result.finish_reason == "abort" and ours and not self.closed
        return result

    async def close(self) -> None:
        """Abort all requests; on return none is under way."""
        self.closed = True
        self.closings += 1
        while self._inside:
            await unless_lost(self.abort())
            await asyncio.sleep(BETWEEN_ABORTS)

    def open(self) -> None:
        self.closed = False

    async def pause(self, mode: PauseMode) -> None:
        """Stop the engines between two tokens, evaluation included."""
        self._aborting = mode == "abort"
        self._interruptions += self._aborting
        await asyncio.gather(*(unless_lost(engine.pause(mode)) for engine in self.engines))

    async def resume(self) -> None:
        await asyncio.gather(*(unless_lost(engine.resume()) for engine in self.engines))
        self._interruptions += self._aborting
        self._aborting = False
