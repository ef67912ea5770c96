"""`utils.http_utils`: how functions of upstream ask the engine."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Mapping
from typing import Any

import aiohttp

from miles_compat.calling import their_loop
from miles_compat.link import HEADER, linked

__all__ = ["get", "post"]
_session: list[aiohttp.ClientSession] = []


async def post(
    url: str, payload: Mapping[str, Any] | None, max_retries: int = 60, headers: Mapping[str, str] | None = None
) -> Any:
    """The reply to a POST, as JSON where it is JSON.

    Tries again after a second when the connection broke, or the server was busy (429) or failed (5xx). What the server
    refuses (4xx) stays refused, and is raised at once with what it said; so is the failure of an engine.
    """
    link = linked()
    told = {**(headers or {}), **({HEADER: link.key} if link else {})}
    for left in reversed(range(max(max_retries, 1))):
        try:
            return await _answer("POST", url, json=payload or {}, headers=told)
        except (aiohttp.ClientError, TimeoutError) as error:
            refused = isinstance(error, aiohttp.ClientResponseError) and error.status < 500 and error.status != 429
            if refused or not left or (link and link.failure is not None):
                raise
        await asyncio.sleep(1)
    return None


async def get(url: str) -> Any:
    """The reply to a GET, as JSON."""
    return await _answer("GET", url)


async def _answer(method: str, url: str, **what: Any) -> Any:
    async with _client().request(method, url, **what) as reply:
        text = await reply.text()
        if reply.status >= 400:
            raise aiohttp.ClientResponseError(
                reply.request_info, reply.history, status=reply.status, message=text[:2000], headers=reply.headers
            )
        return await reply.json(content_type=None) if "json" in reply.content_type else text


def _client() -> aiohttp.ClientSession:
    """One for the process, in the loop of upstream's functions; none of the surroundings' proxies."""
    if not _session:
        connector = aiohttp.TCPConnector(limit=0)
        _session.append(aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)))
        atexit.register(lambda: asyncio.run_coroutine_threadsafe(_session.pop().close(), their_loop()).result(5))
    return _session[0]
