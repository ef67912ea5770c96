"""The web application: routes, who may use them, and how errors look from outside."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from miles.api import EngineError
from miles_serve import native, openai_api
from miles_serve.errors import RequestError
from miles_serve.service import Service

logger = logging.getLogger("miles")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY_LIMIT = 256 * 1024**2
"""Bytes of the largest request that is read."""
OPEN = ("/health", "/health_generate", "/ping")
"""What is answered without a key."""


class Door(Protocol):
    """Who comes in."""

    @property
    def api_key(self) -> str | None:
        """What clients have to send as `Authorization: Bearer ...`; nothing when None."""

    @property
    def stopping(self) -> bool:
        """No request is taken any more."""


def make_app(service: Service) -> web.Application:
    """SGLang's API and OpenAI's over one service."""
    return application([*native.routes(service), *openai_api.routes(service)], service)


def application(routes: Sequence[web.RouteDef], door: Door) -> web.Application:
    """To be run with `handler_cancellation=True`, so that a client that leaves takes its requests along."""
    app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_answering_errors, _guarding(door)])
    app.add_routes(routes)
    return app


def _guarding(door: Door) -> Any:
    """Refuses who has no key, what a page of another site has a browser ask, and everybody once the server is about to
    end."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if door.api_key is not None and request.path not in OPEN:
            given = request.headers.get("Authorization", "").encode()
            if not secrets.compare_digest(given, f"Bearer {door.api_key}".encode()):
                raise RequestError("The API key is missing or wrong: send it as `Authorization: Bearer KEY`.", 401)
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise RequestError("Pages of other sites are not answered.", 403)
        if door.stopping and request.path not in OPEN:
            raise RequestError("The server is stopping.", 503)
        return await handler(request)

    return guard


@web.middleware
async def _answering_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No error ends the server, or tells a client what it is none of his business to know."""
    try:
        return await handler(request)
    except RequestError as error:
        return _error(request, str(error), error.status, error.param, error.code)
    except EngineError as error:
        return _error(request, str(error), 503)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _error(request, error.text or error.reason, error.status)
    except ConnectionError:
        raise  # the client has left
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _error(request, "The server failed; its log says how.", 500)


def _error(
    request: web.Request, message: str, status: int, param: str | None = None, code: str | None = None
) -> web.Response:
    """As SGLang says it, and under `/v1/` and in sessions as OpenAI does."""
    said: dict[str, Any] = {"message": message}
    if request.path.startswith(("/v1/", "/sessions/")):
        kind = "invalid_request_error" if status < 500 else "server_error"
        said |= {"type": kind, "param": param, "code": code or HTTPStatus(status).phrase.lower().replace(" ", "_")}
    return web.json_response({"error": said}, status=status)
