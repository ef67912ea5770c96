"""`/generate`: prompts in, answers out, at once or as they are made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from miles.api import EngineError
from miles_serve.asked import Asked, Wanted, read_asked
from miles_serve.bodies import GenerateBody, read
from miles_serve.concurrent import all_of, merged
from miles_serve.errors import RequestError
from miles_serve.replies import Reply
from miles_serve.service import Service
from miles_serve.sse import EventStream


async def generate(service: Service, request: web.Request) -> web.StreamResponse:
    """The handler of `/generate`."""
    asked = read_asked(service, await read(request, GenerateBody))
    if asked.stream:
        return await _stream(service, asked, EventStream(request))
    replies = await all_of([_whole(service, wanted) for wanted in asked.answers])
    return web.json_response(replies if asked.batch else replies[0])


async def _stream(service: Service, asked: Asked, events: EventStream) -> web.StreamResponse:
    try:
        async with aclosing(merged([_pieces(service, wanted) for wanted in asked.answers])) as pieces:
            async for index, piece in pieces:
                await events.send(piece | {"index": index} if asked.batch else piece)
    except (RequestError, EngineError) as error:
        if not events.started:
            raise
        await events.send({"error": {"message": str(error)}})
    return await events.done()


async def _whole(service: Service, wanted: Wanted) -> dict[str, Any]:
    reply = Reply(service, wanted)
    await _score(service, wanted, reply)
    if not reply.finished:
        reply.add(await service.generate(wanted.request))
    return reply.whole()


async def _pieces(service: Service, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
    """An answer as it is made."""
    reply = Reply(service, wanted)
    await _score(service, wanted, reply)
    if reply.finished:
        yield reply.whole()
        return
    async with aclosing(service.stream(wanted.request)) as results:
        async for result in results:
            reply.add(result)
            yield reply.news() if service.incremental else reply.whole()


async def _score(service: Service, wanted: Wanted, reply: Reply) -> None:
    """What is wanted to be known of the prompt, and of tokens that may come next."""
    engine: Any = service.engine
    tokens, sampling = wanted.request.tokens, wanted.request.sampling
    for candidate in wanted.candidates if wanted.log_probs else ():
        scored = engine.score([*tokens, candidate], sampling.temperature or 1.0)
        if (scores := await service.score(wanted.request.id, scored)) is None:
            reply.abort()
            return
        reply.score_candidate(candidate, float(scores[-1]))
    if not wanted.scores:
        return
    temperature = wanted.score_temperature or 1.0
    scores = await service.score(wanted.request.id, engine.score(tokens, temperature))
    if scores is None:
        reply.abort()
        return
    reply.score(scores)
    if wanted.top:
        top = await service.score(wanted.request.id, engine.score_top(tokens, wanted.top, temperature))
        reply.abort() if top is None else reply.score_top(*top)
