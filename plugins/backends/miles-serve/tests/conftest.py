"""A tiny model behind `miles serve`, in a thread of its own: tests are its clients."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest

from miles.api import GenerateRequest, GenerateResult
from miles.testing import tiny
from miles.testing.contract import installed


@dataclass
class Reply:
    status: int
    text: str
    headers: Any = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """What a stream of server-sent events held, `[DONE]` included."""
        data = [part.removeprefix("data: ") for part in self.text.split("\n\n") if part]
        return [part if part == "[DONE]" else json.loads(part) for part in data]


class Client:
    """Asks a server. `work(session)` for what takes more than one call at a time."""

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        self.url, self.headers = url, headers or {}

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Reply:
        kwargs = kwargs if body is None else {"json": body, **kwargs}
        return self.run(lambda session: ask(session, "POST", path, **kwargs))

    def get(self, path: str, **kwargs: Any) -> Reply:
        return self.run(lambda session: ask(session, "GET", path, **kwargs))

    def run(self, work: Any, seconds: float = 60) -> Any:
        async def main() -> Any:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(self.url, headers=self.headers, connector=connector) as session:
                return await asyncio.wait_for(work(session), seconds)

        return asyncio.run(main())


async def ask(session: aiohttp.ClientSession, method: str, path: str, **kwargs: Any) -> Reply:
    async with session.request(method, path, **kwargs) as reply:
        return Reply(reply.status, await reply.text(), reply.headers)


async def make_service(
    model_type: str = "llama", folder: Path | None = None, options: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A service on a tiny model, or on that in `folder`, whose engine was started."""
    from miles_serve.service import Service

    from miles.config import Spec
    from miles.modeling import load_hf_config

    folder = folder or tiny.saved(model_type)
    config = load_hf_config(folder)
    context = tiny.engine_context(installed(), config, folder)
    engine = installed().build("rollout_engines", Spec(name="torch", options=options or {}), context=context)
    await engine.start()
    given = {
        "engine": engine,
        "chat": tiny.chat_format(installed()),
        "tokenizer": context.tokenizer,
        "hf_config": config,
        "model": "tiny",
        "model_path": str(folder),
        "context_length": config.max_position_embeddings,
    }
    return Service(**{**given, **changes})


@contextmanager
def serving(make: Any = make_service, **changes: Any) -> Iterator[Any]:
    """A server in a thread: its client, and the service behind it (`on_loop` calls something where it lives)."""
    from miles_serve.server import listening

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        service = on_loop(make(**changes))
        server = listening(service, "127.0.0.1", 0, grace=0.2)
        url = on_loop(server.__aenter__())
        try:
            yield SimpleNamespace(url=url, client=Client(url), service=service, on_loop=on_loop)
        finally:
            on_loop(server.__aexit__(None, None, None))
            on_loop(service.engine.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Scripted:
    """An engine that says what is written: `(text, finish reason)` in turn, a token at a time, the last one again and
    again. A stop token ends what stops by itself. Log-probabilities count down."""

    accepts: frozenset[str] = frozenset()
    generates = True
    version = 3

    def __init__(self, *answers: tuple[str, str], patience: float = 0.0, fails: Exception | None = None):
        """`patience`: seconds between two tokens; `fails`: what is raised after two of them."""
        self.answers, self.patience, self.fails = answers, patience, fails
        self.chat = tiny.chat_format(installed())
        self.requests: list[GenerateRequest] = []
        self.left: list[str] = []
        """Requests that their clients did not wait for."""

    def _tokens(self, request: GenerateRequest) -> tuple[list[int], str]:
        text, reason = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        tokens, room = self.chat.render_text(text), request.sampling.max_new_tokens
        if reason == "stop" and not any(stop in text for stop in request.sampling.stop):
            tokens = [*tokens, *request.sampling.stop_token_ids[:1]]
        return (tokens, reason) if len(tokens) <= room else (tokens[:room], "length")

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        tokens, reason = self._tokens(request)
        try:
            for i, token in enumerate(tokens):
                await asyncio.sleep(self.patience)
                if self.fails and i == 2:
                    raise self.fails
                yield GenerateResult([token], [-0.25 * (1 + i)], "", [self.version])
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(request.id)
            raise
        yield GenerateResult([], [], reason, [], cached_tokens=2)  # type: ignore[arg-type]

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        from miles_serve.chat import joined

        return joined([piece async for piece in self.stream(request)])

    async def score(self, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        return -np.arange(len(tokens), dtype=np.float32) * temperature

    async def abort(self, request_id: str | None = None) -> None: ...

    async def close(self) -> None: ...


async def scripted_service(engine: Any, **changes: Any) -> Any:
    """A service on an engine that plays a part. It knows tokens, and no model."""
    from miles_serve.service import Service

    given = {
        "engine": engine,
        "chat": tiny.chat_format(installed()),
        "tokenizer": tiny.tokenizer(),
        "hf_config": tiny.hf_config("llama"),
        "model": "tiny",
        "model_path": "/models/tiny",
        "context_length": 1024,
        "end_token_ids": tiny.chat_format(installed()).stop_token_ids,
    }
    return Service(**{**given, **changes})


@pytest.fixture(scope="session")
def lab() -> Any:
    return SimpleNamespace(
        serving=serving,
        make_service=make_service,
        scripted_service=scripted_service,
        Scripted=Scripted,
        Client=Client,
        ask=ask,
        tiny=tiny,
    )


@pytest.fixture
def playing() -> Iterator[Any]:
    """`playing(engine)`: a server in front of an engine that plays a part."""
    with ExitStack() as stack:
        yield lambda engine, **changes: stack.enter_context(serving(scripted_service, engine=engine, **changes))


@pytest.fixture(scope="session")
def shared() -> Iterator[Any]:
    """One server for all tests that leave it as they found it."""
    with serving() as server:
        yield server
