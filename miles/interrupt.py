"""SIGTERM and Ctrl-C as a request to stop at a safe place, not a bolt from the blue."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from miles.errors import RunInterrupted
from miles.log import logger

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Remembers the first signal; a second one of the same kind acts at once, as Python would."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = asyncio.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are requests. Only the main thread can receive them; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._receive, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _receive(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(number)
        name = signal.Signals(number).name
        logger.warning("%s: stopping at the next safe place and saving; the same again stops at once", name)
        self.signal = self.signal or number
        self._asked.set()

    async def guard(self, work: Awaitable[T]) -> T:
        """Await `work`, or cancel it when a signal asks.

        Raises:
            RunInterrupted: a signal came, now or earlier.
        """
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if self.signal is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise RunInterrupted(f"stopped by {signal.Signals(self.signal).name}", self.signal)
            return task.result()
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
