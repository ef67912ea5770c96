"""The servers of one engine, the router before them, and what is said to all of them at once."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

from miles.api import EngineError
from miles_sglang.client import Body, Client, LateError, PassingError

CONTROL = 60.0
"""Seconds for an answer that needs no work."""
AGAIN = 0.2
"""Seconds before something is said again."""
LONG = 1800.0
"""Seconds for one that moves weights or memory."""


class Server(Protocol):
    """A server or a router, of this engine (`server.ServerProcess`) or of somebody else (`external.RunningServer`)."""

    url: str

    async def start(self) -> None:
        """Returns when it answers; also after `stop`, or when it has died."""

    def death(self) -> str:
        """Why it is no more, with the last lines of its log; empty while it runs."""

    async def stop(self) -> None: ...

    def close(self) -> None:
        """It will not be started again."""


class Fleet:
    """At least one server."""

    def __init__(self, client: Client, servers: Sequence[Server], router: Server | None = None):
        self.client, self.servers, self.router = client, list(servers), router

    def entrance(self, key: str, direct: bool) -> str:
        """Where a request goes: to the router, or, when that would not understand it (`direct`) or there is none, to
        the server that all requests of this key go to, which has what they share in its cache."""
        if self.router and not direct:
            return self.router.url
        return self.servers[zlib.crc32(key.encode()) % len(self.servers)].url

    async def start(self) -> None:
        """Also after `stop`. The router comes last: it wants to find its servers.

        Raises:
            EngineError: one of them did not come up; then none is left running.
        """
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
            if self.router:
                await self.router.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        await asyncio.gather(*(one.stop() for one in self._everybody))

    async def close(self) -> None:
        await self.stop()
        for one in self._everybody:
            one.close()

    def death(self) -> str:
        """Of the first that is no more; empty when all run."""
        return next((why for one in self._everybody if (why := one.death())), "")

    @property
    def _everybody(self) -> list[Server]:
        return [*([self.router] if self.router else []), *self.servers]

    async def tell(self, path: str, body: Body = None, timeout: float = CONTROL, tries: int = 3) -> None:
        """Every server, at once.

        Args:
            tries: how often it is said when a fault may pass (no time-out); 1 for what must not be done twice.

        Raises:
            EngineError: one of them did not do it.
        """
        await asyncio.gather(*(self._tell(server.url + path, body, timeout, tries) for server in self.servers))

    async def tell_each(self, path: str, bodies: Sequence[Body], timeout: float) -> None:
        """Every server something else, at once and only once. Raises as `tell`."""
        pairs = zip(self.servers, bodies, strict=True)
        await asyncio.gather(*(self._tell(server.url + path, body, timeout, 1) for server, body in pairs))

    async def _tell(self, url: str, body: Body, timeout: float, tries: int) -> None:
        for _ in range(tries - 1):
            try:
                return await self.client.tell(url, body, timeout)
            except PassingError as error:
                if isinstance(error, LateError) or self.death():
                    raise
                await asyncio.sleep(AGAIN)
        return await self.client.tell(url, body, timeout)

    async def ask(self, path: str) -> list[dict[str, Any]]:
        """What each server says.

        Raises:
            EngineError: one of them does not answer, or not with a JSON object.
        """
        said = await asyncio.gather(*(self.client.ask(server.url + path, None, CONTROL) for server in self.servers))
        if not all(isinstance(answer, dict) for answer in said):
            raise EngineError(f"a server answers {path} with what is no object: {said}")
        return said

    async def silence(self, path: str, timeout: float) -> str:
        """Why one of them does not answer; empty when all do."""
        try:
            await self.tell(path, None, timeout, tries=1)
        except EngineError as error:
            return str(error)
        return ""
