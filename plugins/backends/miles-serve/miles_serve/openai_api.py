"""The OpenAI-compatible API: its routes, and the model that it has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from miles.api import ConfigError, DataError, EngineError
from miles_serve import openai_chat, openai_completions
from miles_serve.bodies import read
from miles_serve.errors import RequestError
from miles_serve.openai_types import Body, ChatBody, CompletionBody
from miles_serve.service import Service
from miles_serve.sse import EventStream

Work = Callable[[web.Request, EventStream], Awaitable[web.StreamResponse]]


def routes(service: Service) -> list[web.RouteDef]:
    async def chat_completions(request: web.Request, events: EventStream) -> web.StreamResponse:
        body = await read(request, ChatBody)
        check_model(service, body)
        chat = openai_chat.understood(service, body)
        return await (openai_chat.stream(chat, events) if body.stream else openai_chat.reply(chat))

    async def completions(request: web.Request, events: EventStream) -> web.StreamResponse:
        body = await read(request, CompletionBody)
        check_model(service, body)
        asked = openai_completions.understood(service, body)
        return await (openai_completions.stream(asked, events) if body.stream else openai_completions.reply(asked))

    async def models(request: web.Request, events: EventStream) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [model_card(service)]})

    async def model(request: web.Request, events: EventStream) -> web.StreamResponse:
        check_name(service, request.match_info["name"])
        return web.json_response(model_card(service))

    return [
        web.get("/v1/models", guarded(models)),
        web.get("/v1/models/{name:.+}", guarded(model)),
        web.post("/v1/chat/completions", guarded(chat_completions)),
        web.post("/v1/completions", guarded(completions)),
    ]


def model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": int(service.started),
        "owned_by": "miles",
        "root": service.model_path,
        "parent": None,
        "max_model_len": service.context_length,
    }


def check_model(service: Service, body: Body) -> None:
    if body.model is not None:
        check_name(service, body.model)


def check_name(service: Service, name: str) -> None:
    """Raises RequestError for a model that is not served here."""
    if name not in (service.model, service.model_path):
        raise RequestError(
            f"The model {name!r} does not exist; this server has {service.model!r}.", 404, "model", "model_not_found"
        )


def guarded(work: Work) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A handler whose messages are the client's business. An error that comes when the reply has begun is its last
    event."""

    async def handler(request: web.Request) -> web.StreamResponse:
        events = EventStream(request)
        try:
            return await work(request, events)
        except (DataError, ConfigError) as error:
            raise RequestError(str(error), param="messages") from error
        except (RequestError, EngineError) as error:
            if not events.started:
                raise
            await events.send({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return await events.done()

    return handler
