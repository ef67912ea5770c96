"""Servers, and routers, that run already."""

from __future__ import annotations

import asyncio
import logging
import time

from miles.api import EngineError
from miles_sglang.client import Client

logger = logging.getLogger("miles")

ASK = 0.5
"""Seconds between two questions whether it is healthy."""
ANSWER = 30.0
"""Seconds for the answer: SGLang generates a token for it."""


class RunningServer:
    """Somebody else's: it is waited for, and neither started nor ended."""

    def __init__(self, url: str, client: Client, timeout: float):
        """`timeout`: seconds until it must be healthy."""
        self.url, self._client, self._timeout = url, client, timeout

    async def start(self) -> None:
        """Returns when it is healthy.

        Raises:
            EngineError: it was not, in time.
        """
        last, silent = time.monotonic() + self._timeout, False
        while True:
            try:
                await self._client.tell(f"{self.url}/health", timeout=ANSWER)
                return
            except EngineError as error:
                if not silent:
                    logger.info("waiting %g s at most for %s to be healthy", self._timeout, self.url)
                    silent = True
                if time.monotonic() > last:
                    raise EngineError(
                        f"no server became healthy at {self.url} within {self._timeout:g} s: {error}"
                    ) from error
            await asyncio.sleep(min(ASK, self._timeout))

    def death(self) -> str:
        """Empty: nobody tells when it ends. That it answers no more is found by asking."""
        return ""

    async def stop(self) -> None:
        """It goes on."""

    def close(self) -> None:
        """Nothing of it is ours."""
