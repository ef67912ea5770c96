"""SGLang's `/generate` on the run's engines: what `args.sglang_router_ip` and `args.sglang_router_port` lead to.

A server on this machine's own address, in the driver's event loop, from the first sample of a function until that
loop or the run ends. It is miles-serve's API in front of `GenerateContext.generate`, without what would change the
engines: they are the run's.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from aiohttp import web
from miles_serve import openai_api
from miles_serve.app import application
from miles_serve.generation import generate
from miles_serve.information import health, model_info, tokenize
from miles_serve.service import Service

from miles.api import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    ROUTED_EXPERTS,
    WEIGHT_VERSION,
    ConfigError,
    EngineError,
    EngineHealth,
    GenerateContext,
    GenerateRequest,
    GenerateResult,
    RolloutEngine,
    Sample,
    SamplingParams,
    take_turn,
)
from miles_compat.current import current
from miles_compat.link import HEADER, Link
from miles_compat.model import hf_config, tokenizer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HOST = "127.0.0.1"
CLOSING = 0.5
"""Seconds for requests that are under way when it ends."""
_asking: ContextVar[Link | None] = ContextVar("miles_compat_asking", default=None)
"""In the task of a request: whose it is."""
_turns = itertools.count(1)


class RunEngines:
    """The run's engines as miles-serve sees one. Only what goes through `GenerateContext.generate` can be asked."""

    accepts: frozenset[str] = frozenset()
    generates = True

    def __init__(self) -> None:
        self.open: dict[str, Link] = {}
        """Samples whose functions are at work."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The whole answer, also where new weights come in the middle of it."""
        link = _asking.get()
        whose = link or next(iter(self.open.values()), None)
        if whose is None:
            raise EngineError("no generate function is at work: the engines are the run's")
        began = time.perf_counter()
        try:
            result = await _turn(whose, request)
        except Exception as error:
            if link is not None:
                link.failure = error
            raise
        if link is not None:
            link.note(request, result, time.perf_counter() - began)
        return result

    async def health(self) -> EngineHealth:
        return EngineHealth(0, len(self.open), 0)

    async def score(self, tokens: Any, temperature: float = 1.0) -> Any:
        raise EngineError("log-probs of given tokens cannot be asked for here, where the run's engines generate")

    async def abort(self, request_id: str | None = None) -> None:
        """A client that leaves takes its request along; nothing else of the run is aborted from here."""


async def _turn(link: Link, request: GenerateRequest) -> GenerateResult:
    """One turn of a sample that holds nothing but the request."""
    start, cached = len(request.tokens), [0]
    sample = Sample(
        -next(_turns), link.sample.group_id, link.sample.prompt, request.tokens[:], start, seed=request.seed
    )
    for column in (LOSS_MASK, ROLLOUT_LOG_PROBS, WEIGHT_VERSION):
        sample.declare(column)

    async def noting(asked: GenerateRequest) -> GenerateResult:
        result = await link.context.generate(asked)
        cached.append(result.cached_tokens)
        return result

    wanted = request.routed_experts or link.context.routed_experts
    context = replace(link.context, generate=noting, sampling=request.sampling, routed_experts=wanted)
    reason: Any = await take_turn(context, sample)
    said = {c.name: sample.columns[c.name][start:].tolist() for c in (ROLLOUT_LOG_PROBS, WEIGHT_VERSION)}
    return GenerateResult(
        tokens=sample.tokens[start:],
        log_probs=said[ROLLOUT_LOG_PROBS.name],
        finish_reason=reason,
        weight_versions=said[WEIGHT_VERSION.name],
        routed_experts=sample.columns.get(ROUTED_EXPERTS),
        cached_tokens=max(cached),
    )


class RunService(Service):
    """A request never asks for more tokens than there is room, and draws as its sample's seed says."""

    def request(
        self, tokens: Any, sampling: SamplingParams, *, seed: int | None = None, **rest: Any
    ) -> GenerateRequest:
        link, room = _asking.get(), max(self.context_length - len(tokens), 0)
        if sampling.max_new_tokens > room:
            sampling = replace(sampling, max_new_tokens=room, min_new_tokens=min(sampling.min_new_tokens, room))
        seed = link.seed(tokens) if seed is None and link is not None else seed
        return super().request(tokens, sampling, seed=seed, **rest)


@dataclass(eq=False)
class Server:
    """One in an event loop."""

    engines: RunEngines
    port: int
    task: asyncio.Task

    @contextmanager
    def serving(self, link: Link) -> Iterator[None]:
        """Requests of the sample's function are answered."""
        self.engines.open[link.key] = link
        try:
            yield
        finally:
            del self.engines.open[link.key]


_servers: dict[asyncio.AbstractEventLoop, asyncio.Future[Server]] = {}


async def server_for(context: GenerateContext) -> Server:
    """The one of this event loop, which is started when it is asked for first."""
    loop = asyncio.get_running_loop()
    if loop not in _servers:
        _servers[loop] = loop.create_future()
        task = loop.create_task(_serve(context, _servers[loop]))
        current.at_end.append(partial(_end, loop, task))
    return await asyncio.shield(_servers[loop])


def _end(loop: asyncio.AbstractEventLoop, task: asyncio.Task) -> None:
    """With the run; where its loop has ended, so has the server."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(task.cancel)


async def _serve(context: GenerateContext, started: asyncio.Future[Server]) -> None:
    """Until this task is cancelled, which the end of its event loop does too."""
    engines, task = RunEngines(), asyncio.current_task()
    runner: web.AppRunner | None = None
    try:
        service = await asyncio.to_thread(_service, context, engines)
        app = application(_routes(service), service)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0, backlog=4096).start()
        assert task is not None
        started.set_result(Server(engines, runner.addresses[0][1], task))
        await asyncio.Event().wait()
    except Exception as error:
        started.set_exception(error)
    finally:
        del _servers[asyncio.get_running_loop()]
        if runner is not None:
            await runner.cleanup()


def _service(context: GenerateContext, engines: RunEngines) -> Service:
    config, checkpoint = hf_config(), str(current.configured().model.hf_checkpoint)
    known = (context.max_context_tokens, getattr(config.get_text_config(), "max_position_embeddings", None))
    limits = [limit for limit in known if limit is not None]
    if not limits:
        raise ConfigError("the model does not say how long a sequence may be: --rollout-max-context-len")
    return RunService(
        engine=cast(RolloutEngine, engines),
        chat=context.chat,
        tokenizer=tokenizer(),
        hf_config=config,
        model=checkpoint,
        model_path=checkpoint,
        context_length=min(limits),
        end_token_ids=tuple(context.chat.stop_token_ids),
    )


def _routes(service: Service) -> list[web.RouteDef]:
    """What may be asked: answers, and what is known of the model."""
    return [
        web.post("/generate", _for_its_sample(service, partial(generate, service))),
        web.put("/generate", _for_its_sample(service, partial(generate, service))),
        web.get("/health", partial(health, service)),
        web.get("/model_info", partial(model_info, service)),
        web.get("/get_model_info", partial(model_info, service)),
        web.post("/tokenize", partial(tokenize, service)),
        *(web.route(r.method, r.path, _for_its_sample(service, r.handler)) for r in openai_api.routes(service)),
    ]


def _for_its_sample(service: Service, handler: Handler) -> Handler:
    """A handler that knows for which sample it works, where the client said so."""

    async def work(request: web.Request) -> web.StreamResponse:
        _asking.set(service.engine.open.get(request.headers.get(HEADER, "")))  # type: ignore[attr-defined]
        return await handler(request)

    return work
