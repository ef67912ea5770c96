"""The HTTP server of a run: a URL for each session, and who is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from aiohttp import web
from miles_serve import openai_chat
from miles_serve.app import application
from miles_serve.bodies import read
from miles_serve.openai_api import guarded
from miles_serve.openai_types import ChatBody
from miles_serve.server import bound
from miles_serve.sse import EventStream

from miles.api import ConfigError
from miles_gateway.session import Session, ended

EVERYWHERE = ("0.0.0.0", "::", "")
PREFIXES = ("/sessions/{id}/v1", "/sessions/{id}/v1/v1")
"""Agents that were written for Miles put a `/v1` of their own behind the address."""


class Gateway:
    """All sessions that are open, on one port."""

    def __init__(self, api_key: str | None = None):
        self.api_key, self.stopping = api_key, False
        self.url = ""
        """`http://host:port` as this machine knows it, once it listens."""
        self.sessions: dict[str, Session] = {}

    @asynccontextmanager
    async def session(self, session: Session, address: str | None = None) -> AsyncIterator[str]:
        """The base URL of a session for as long as it is open. `address`: host that its agent knows the server by."""
        url = f"http://{address}:{self.url.rpartition(':')[2]}" if address else self.url
        self.sessions[session.id] = session
        try:
            yield f"{url}/sessions/{session.id}/v1"
        finally:
            del self.sessions[session.id]
            await session.close()

    def app(self) -> web.Application:
        chat, models = guarded(self._chat), guarded(self._models)
        routes = [
            web.get("/sessions/{id}", guarded(self._summary)),
            web.delete("/sessions/{id}", guarded(self._delete)),
        ]
        for prefix in PREFIXES:
            routes += [web.post(f"{prefix}/chat/completions", chat), web.get(f"{prefix}/models", models)]
        return application(routes, self)

    def _find(self, request: web.Request) -> Session:
        """Raises RequestError where there is none."""
        id = request.match_info["id"]
        session = self.sessions.get(id)
        if session is None or session.closed:
            raise ended(id)
        return session

    async def _chat(self, request: web.Request, events: EventStream) -> web.StreamResponse:
        session = self._find(request)
        with session.asked():
            body = await read(request, ChatBody)
            chat = session.understood(body)
            return await (openai_chat.stream(chat, events) if body.stream else openai_chat.reply(chat))

    async def _models(self, request: web.Request, events: EventStream) -> web.StreamResponse:
        self._find(request)
        card = {"id": "policy", "object": "model", "created": 0, "owned_by": "miles"}
        return web.json_response({"object": "list", "data": [card]})

    async def _summary(self, request: web.Request, events: EventStream) -> web.StreamResponse:
        return web.json_response(self._find(request).summary)

    async def _delete(self, request: web.Request, events: EventStream) -> web.StreamResponse:
        session = self._find(request)
        await session.close()
        return web.json_response({"id": session.id, "object": "session", "deleted": True})

    async def settle(self) -> None:
        """End every session."""
        self.stopping = True
        await asyncio.gather(*(session.close() for session in self.sessions.values()))


_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], tuple[asyncio.Future, asyncio.Task]]]
_servers = WeakKeyDictionary()


async def gateway_at(host: str, port: int, api_key: str | None = None) -> Gateway:
    """The server of this event loop at `host:port`. It starts when it is first asked for, and ends with the loop.

    Raises:
        ConfigError: nobody can listen there, or the one that does has another key.
    """
    servers = _servers.setdefault(asyncio.get_running_loop(), {})
    if (host, port) not in servers:
        ready = asyncio.get_running_loop().create_future()
        servers[host, port] = ready, asyncio.create_task(_serve(Gateway(api_key), host, port, ready))
    gateway: Gateway = await asyncio.shield(servers[host, port][0])
    if gateway.api_key != api_key:
        raise ConfigError(
            f"agent: the server at {gateway.url} has another key: give all task sets one api_key_variable"
        )
    return gateway


async def _serve(gateway: Gateway, host: str, port: int, ready: asyncio.Future) -> None:
    """Until the event loop ends: it cancels its tasks then, and waits for what they have to do."""
    servers = _servers[asyncio.get_running_loop()]
    try:
        async with bound(gateway.app(), host, port, gateway.settle) as url:
            gateway.url = f"http://127.0.0.1:{url.rpartition(':')[2]}" if host in EVERYWHERE else url
            ready.set_result(gateway)
            await asyncio.get_running_loop().create_future()
    except Exception as error:
        if ready.done():
            raise
        ready.set_exception(error)
    finally:
        servers.pop((host, port), None)
