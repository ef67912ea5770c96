"""An engine behind HTTP in this process, as `miles serve` puts it there, and what it was asked for."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import numpy as np
from miles_serve.server import listening
from miles_serve.service import Service

from miles.api import (
    EngineContext,
    EngineHealth,
    EnginePart,
    GenerateRequest,
    GenerateResult,
    PauseMode,
    RolloutEngine,
)
from miles.config import Spec
from miles.plugins import load_plugins
from miles.protocols import ChatContext
from miles.registry import Registry
from miles.testing import tiny

T = TypeVar("T")


class Oracle:
    """An engine whose answers follow from what it is asked: token `i` is the seed plus `i`, more or less. While it is
    `stuck`, requests run until somebody aborts them."""

    accepts = frozenset({"disk"})
    generates = True

    def __init__(self) -> None:
        self.stuck = False
        self.version = 0
        self._aborts: dict[str, asyncio.Event] = {}

    def said(self, request: GenerateRequest) -> list[int]:
        return [10 + (request.seed + i) % 200 for i in range(request.sampling.max_new_tokens)]

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        aborted = self._aborts[request.id] = asyncio.Event()
        try:
            await asyncio.sleep(0.01)  # two deliveries of one request meet here
            if self.stuck:
                await aborted.wait()
        finally:
            del self._aborts[request.id]
        if aborted.is_set():
            return GenerateResult([], [], "abort", [])
        tokens = self.said(request)
        return GenerateResult(tokens, [-0.5] * len(tokens), "length", [self.version] * len(tokens))

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        return np.array([0.0] + [-0.5] * (len(tokens) - 1), np.float32)

    async def abort(self, request_id: str | None = None) -> None:
        for id, aborted in self._aborts.items():
            if request_id in (None, id):
                aborted.set()

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        self.version = version

    async def health(self) -> EngineHealth:
        return EngineHealth(self.version, len(self._aborts), 0)

    async def start(self) -> None: ...

    async def pause(self, mode: PauseMode = "retract") -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def sleep(self, parts: frozenset[EnginePart]) -> None: ...

    async def wake(self, parts: frozenset[EnginePart]) -> None: ...

    async def close(self) -> None: ...


class Witness:
    """An engine that keeps a list of what it worked on."""

    def __init__(self, engine: RolloutEngine):
        self.engine = engine
        self.generated: Counter[str] = Counter()
        """Ids of requests, as the server's client gave them."""
        self.running: set[str] = set()
        if hasattr(engine, "stream"):
            self.stream = self._stream

    @contextmanager
    def _at_work(self, id: str) -> Iterator[None]:
        self.generated[id] += 1
        self.running.add(id)
        try:
            yield
        finally:
            self.running.discard(id)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        with self._at_work(request.id):
            return await self.engine.generate(request)

    async def _stream(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        with self._at_work(request.id):
            async with aclosing(self.engine.stream(request)) as pieces:  # type: ignore[attr-defined]
                async for piece in pieces:
                    yield piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def tiny_context(model_type: str = "llama", seed: int = 0) -> EngineContext:
    """What engines for a tiny model are built from, on both sides of the server."""
    return tiny.engine_context(Registry(load_plugins()), tiny.hf_config(model_type), tiny.saved(model_type, seed))


@asynccontextmanager
async def served(engine: RolloutEngine, context: EngineContext, **options: Any) -> AsyncIterator[str]:
    """Start an engine and put it behind HTTP: its address. Both end with the `async with`. `options` are of the
    service."""
    await engine.start()
    chat = Registry(load_plugins()).build("chat_formats", Spec(name="template"), context=ChatContext(context.tokenizer))
    limit = context.hf_config.max_position_embeddings
    folder = str(context.checkpoint)
    service = Service(engine, chat, context.tokenizer, context.hf_config, "tiny", folder, limit, **options)
    try:
        async with listening(service, "127.0.0.1", 0, grace=0.1) as url:
            yield url
    finally:
        await engine.close()


@contextmanager
def in_thread(lasting: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What `async with` gives, in an event loop of its own: for tests whose work has one already."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(lasting.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(lasting.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
