"""Engine `none`: for training on given text. It holds no model, so nothing can be generated, scored or kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.api import EngineContext, EngineError, EngineHealth, EnginePart, GenerateRequest, GenerateResult, PauseMode


class NoEngine:
    accepts = frozenset({"inprocess"})
    generates = False

    def __init__(self, *, context: EngineContext):
        self.version = -1

    async def start(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        raise self._refusal(f"generate for request {request.id!r}")

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        raise self._refusal(f"score {len(tokens)} tokens")

    def _refusal(self, what: str) -> EngineError:
        return EngineError(
            f"engine none holds no model and cannot {what}; train on data that has answers (generate: dataset), or "
            "choose an engine with --rollout-engine torch"
        )

    async def abort(self, request_id: str | None = None) -> None: ...

    async def pause(self, mode: PauseMode = "retract") -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def sleep(self, parts: frozenset[EnginePart]) -> None: ...

    async def wake(self, parts: frozenset[EnginePart]) -> None: ...

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """Takes note of the version; the weights go nowhere."""
        self.version = version

    async def health(self) -> EngineHealth:
        return EngineHealth(self.version, running=0, waiting=0)

    async def close(self) -> None: ...
