"""Requests that are under way, and the gate they come in by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from miles_serve.errors import RequestError


class Traffic:
    """Who is in, and who waits outside: while the engine is paused, and while its weights are changed."""

    def __init__(self) -> None:
        self.underway: set[str] = set()
        """Ids of requests that the engine has."""
        self._outside: dict[str, asyncio.Future] = {}
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()
        self._paused = self._busy = False
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def entered(self, id: str) -> AsyncIterator[bool]:
        """Whether the request came in; not, if it was aborted outside. It is under way while this lasts.

        Raises:
            RequestError: a request of this id is here already.
        """
        if id in self.underway or id in self._outside:
            raise RequestError(f"Duplicate request ID detected: {id!r} is under way already.")
        if not await self._let_in(id):
            yield False
            return
        self.underway.add(id)
        self._idle.clear()
        try:
            yield True
        finally:
            self.underway.discard(id)
            if not self.underway:
                self._idle.set()

    async def _let_in(self, id: str) -> bool:
        while not self._open.is_set():
            self._outside[id] = opened = asyncio.ensure_future(self._open.wait())
            try:
                await asyncio.wait([opened])
            finally:
                del self._outside[id]
                aborted = opened.cancelled()
                opened.cancel()
            if aborted:
                return False
        return True

    def turn_away(self, prefix: str = "") -> None:
        """Abort the requests outside whose ids begin like this."""
        for id, opened in self._outside.items():
            if id.startswith(prefix):
                opened.cancel()

    @property
    def paused(self) -> bool:
        """Nobody comes in until this is set to False again."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        self._turn()

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing is under way, but not longer than so many seconds; whether that is so."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return not self.underway
        return True

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody comes in. It begins when those who are in are done, or at once if they are paused."""
        async with self._changing:
            self._busy = True
            self._turn()
            try:
                if not self._paused:
                    await self._idle.wait()
                yield
            finally:
                self._busy = False
                self._turn()

    def _turn(self) -> None:
        if self._paused or self._busy:
            self._open.clear()
        else:
            self._open.set()
