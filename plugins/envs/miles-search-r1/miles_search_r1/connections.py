"""HTTP for searches: one pool of connections for all trajectories, requests that are tried again, failures in words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import aiohttp

from miles.api import RolloutError

FIRST_PAUSE = 0.2
"""Seconds before the second attempt; each further pause is twice as long."""
REFUSED = (400, 413, 422)
"""Status of a request that the server understood and declines: a fault of the query, not of server or key."""
TOO_MANY_REQUESTS = 429
QUOTED = 200
"""Characters of a reply that an error quotes."""


class SearchError(RolloutError):
    """A search that cannot be had: nobody answers, too late, or with something that is no result."""


class SearchRefused(SearchError):
    """The server declined this query: others may do better."""


class Connections:
    """A trajectory's share of the connections of its event loop. They are closed with the last trajectory."""

    _shared: ClassVar[dict[asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, int]]] = {}

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            session, users = self._shared.get(self._loop) or (_new_session(), 0)
            self._shared[self._loop] = session, users + 1
        return self._shared[self._loop][0]

    async def close(self) -> None:
        if self._loop is None:
            return
        session, users = self._shared.pop(self._loop)
        if users > 1:
            self._shared[self._loop] = session, users - 1
        self._loop = None
        if users == 1:
            await session.close()


def _new_session() -> aiohttp.ClientSession:
    """Without a limit of its own: how many searches are under way is for `concurrency` to say."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    *,
    timeout: float,
    retries: int,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """The JSON that `url` answers with.

    Args:
        timeout: seconds of one attempt.
        retries: further attempts after a connection that broke, no reply in time, 429 or 5xx.
        headers: sent, and never shown in an error.

    Raises:
        SearchRefused: 400, 413 or 422.
        SearchError: no attempt got an answer, it is no JSON, or another 4xx (no such page, a wrong key).
    """
    limit = aiohttp.ClientTimeout(total=timeout)
    for pause in (0.0, *pauses(retries)):
        await asyncio.sleep(pause)
        try:
            async with session.post(url, json=body, headers=headers, timeout=limit) as reply:
                text = await reply.text(errors="replace")
        except TimeoutError:
            trouble = f"no reply within {timeout:g} seconds"
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"{type(error).__name__}: {error}"
        else:
            if reply.status < 400:
                return _parsed(url, text)
            trouble = f"status {reply.status}: {quoted(text)}"
            if reply.status < 500 and reply.status != TOO_MANY_REQUESTS:
                raise (SearchRefused if reply.status in REFUSED else SearchError)(f"{url}: {trouble}")
    raise SearchError(f"{url}: {trouble} ({retries + 1} attempts)")


def pauses(retries: int) -> list[float]:
    """Seconds before each further attempt."""
    return [FIRST_PAUSE * 2**attempt for attempt in range(retries)]


def _parsed(url: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SearchError(f"{url}: the reply is no JSON: {quoted(text)}") from error


def quoted(value: Any) -> str:
    """The beginning of it, for an error."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."
