"""A program that answers HTTP on a port of its own: started, waited for, watched and ended."""

from __future__ import annotations

import asyncio
import importlib.util
import time

import aiohttp

from miles.api import EngineError
from miles_sglang.ports import HOST, Port
from miles_sglang.process import GuardedProcess

ASK = 0.25
"""Seconds between two questions whether it is healthy."""
ANSWER = 30.0
"""Seconds for the answer: SGLang generates a token for it."""


class Service:
    """Answers at `url` between `start` and `stop`. A subclass sets `process`, which is to listen on the first port."""

    process: GuardedProcess
    timeout: float
    """Seconds from its start until it must be healthy."""

    def __init__(self) -> None:
        self.ports = Port(), Port()
        self.url = f"http://{HOST}:{self.ports[0].number}"

    async def start(self) -> None:
        """Returns when it is healthy. Also after `stop`, or when it has died.

        Raises:
            EngineError: it ended, or it was not healthy in time.
        """
        await self.process.stop()
        self.process.start()
        try:
            await self._healthy()
        except BaseException:
            await self.process.stop()
            raise

    def death(self) -> str:
        """How it ended, with the last lines of its log; empty while it runs."""
        return self.process.death()

    async def stop(self) -> None:
        """End it and all its children."""
        await self.process.stop()

    def close(self) -> None:
        """Give its ports back."""
        for port in self.ports:
            port.close()

    async def ready(self, session: aiohttp.ClientSession) -> bool:
        """Ask it once. May raise what a session raises."""
        async with session.get(f"{self.url}/health") as reply:
            return reply.status == 200

    async def _healthy(self) -> None:
        last = time.monotonic() + self.timeout
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=min(ANSWER, self.timeout))) as session:
            while not await self._answers(session):
                if death := self.death():
                    raise EngineError(f"{death}\nThat was before it was healthy.")
                if time.monotonic() > last:
                    raise EngineError(
                        f"{self.process.name} was not healthy within {self.timeout:g} s; {self.process.last_lines()}"
                    )
                await asyncio.sleep(ASK)

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        try:
            return await self.ready(session)
        except (aiohttp.ClientError, TimeoutError):  # not listening yet
            return False


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
