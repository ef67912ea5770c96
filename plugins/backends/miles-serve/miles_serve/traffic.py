"""Requests that are under way, and the gate they come in by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from miles_serve.errors import RequestError


class Traffic:
    """Who is in. The gate is shut while weights are changed; who comes then waits."""

    def __init__(self) -> None:
        self.underway: set[str] = set()
        """Ids of requests that the engine has."""
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def entered(self, id: str) -> AsyncIterator[None]:
        """Under way while it lasts.

        Raises:
            RequestError: a request of this id is under way.
        """
        await self._open.wait()
        if id in self.underway:
            raise RequestError(f"Duplicate request ID detected: {id!r} is under way already.")
        self.underway.add(id)
        self._idle.clear()
        try:
            yield
        finally:
            self.underway.discard(id)
            if not self.underway:
                self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing is under way, but not longer than so many seconds; whether that is so."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return not self.underway
        return True

    @asynccontextmanager
    async def alone(self, beside: bool) -> AsyncIterator[None]:
        """Nobody comes in. With `beside`, those who are in may stay, as they do while the engine is paused; otherwise
        this begins when they are done."""
        async with self._changing:
            self._open.clear()
            try:
                if not beside:
                    await self._idle.wait()
                yield
            finally:
                self._open.set()
