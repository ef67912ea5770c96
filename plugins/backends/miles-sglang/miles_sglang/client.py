"""HTTP to SGLang's servers: one pool of connections, and which faults may have passed when a request is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import orjson

from miles.api import EngineError

CONNECT = 10.0
"""Seconds for a connection to be made."""
IDLE = 4.0
"""Seconds for which an idle connection is kept. Uvicorn, under which SGLang runs, closes it after 5, and requests must
not meet connections that are just being closed."""
QUOTED = 500
"""Characters of an answer that an error quotes."""
PASSING = frozenset({408, 425, 429})
"""Statuses, besides those from 500 on, of a server that may answer another time."""

FAILURES = (aiohttp.ClientError, ConnectionError)
"""What a connection that is not made, or breaks, raises. (Also when it takes too long to be made.)"""

Body = Mapping[str, Any] | None
Headers = Mapping[str, str] | None


class PassingError(EngineError):
    """A fault that may have passed when the request is tried again."""

    kind = "refused"
    """What it is counted as."""


class UnreachableError(PassingError):
    """No connection was made, or it broke."""

    kind = "unreachable"


class LateError(PassingError):
    """No answer in time."""

    kind = "timeouts"


class MalformedError(PassingError):
    """An answer that is none."""

    kind = "malformed"


class Client:
    """Belongs to the event loop in which it is first used."""

    def __init__(self, api_key: str | None = None):
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, url: str, body: Body = None, timeout: float | None = None, headers: Headers = None) -> Any:
        """POST `body`, or GET without one. The answer's JSON.

        Raises:
            PassingError: see its kinds.
            EngineError: the server refuses this request.
        """
        return _json(url, await self._answer(url, body, timeout, headers))

    async def tell(self, url: str, body: Body = None, timeout: float | None = None) -> None:
        """The same where only success matters: some answers are text, some empty.

        Raises:
            PassingError, EngineError: as `ask`; and the server says that it did not do it.
        """
        data = await self._answer(url, body, timeout)
        if data.startswith(b"{") and _json(url, data).get("success") is False:
            raise EngineError(f"{url} failed: {_quoted(data)}")

    async def events(self, url: str, body: Body, headers: Headers = None) -> AsyncGenerator[Any, None]:
        """POST and receive the answer's chunks (server-sent events), each as JSON.

        Raises:
            PassingError, EngineError: as `ask`; and the stream ends without saying so.
        """
        try:
            async with self._request(url, body, headers) as reply:
                if reply.status != 200:
                    raise _refusal(url, reply.status, await reply.read())
                async for line in _lines(reply.content):
                    if line == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield _json(url, line[6:])
        except FAILURES as error:
            raise _unreachable(url, error) from error
        raise MalformedError(f"{url} ended its stream in the middle")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _answer(self, url: str, body: Body, timeout: float | None, headers: Headers = None) -> bytes:
        try:
            async with asyncio.timeout(timeout), self._request(url, body, headers) as reply:
                data = await reply.read()
        except FAILURES as error:
            raise _unreachable(url, error) from error
        except TimeoutError as error:
            raise LateError(f"{url} did not answer within {timeout} s") from error
        if reply.status != 200:
            raise _refusal(url, reply.status, data)
        return data

    def _request(self, url: str, body: Body, headers: Headers) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                read_bufsize=2**20,
            )
        if body is None:
            return self._session.get(url, headers=headers)
        return self._session.post(url, data=orjson.dumps(body), headers=headers)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length, without their ends."""
    rest = b""
    async for data in content.iter_any():
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _json(url: str, data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError as error:
        raise MalformedError(f"{url} answered with what is not JSON: {_quoted(data)}") from error


def _unreachable(url: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"{url} was not reached, or broke off: {str(error) or type(error).__name__}")


def _refusal(url: str, status: int, data: bytes) -> EngineError:
    passing = status >= 500 or status in PASSING
    return (PassingError if passing else EngineError)(f"{url} answered with status {status}: {_quoted(data)}")


def _quoted(data: bytes) -> str:
    return data[:QUOTED].decode(errors="replace") or "nothing"
