"""SIGTERM and Ctrl-C as a request to stop at a safe place, not a bolt from the blue."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from miles.errors import RunInterrupted
from miles.log import logger

T = TypeVar("T")
AT_ONCE: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
"""What these signals do in a Python that nobody has told otherwise."""


class Interrupt:
    """Remembers the first signal; a second one of the same kind acts at once, as Python would."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = asyncio.Event()

    @contextmanager
    def listening(self, task: asyncio.Task | None = None) -> Iterator[None]:
        """Within it, signals are requests: to cancel `task`, the one that runs here, or else for `guard` to find. Only
        the main thread can receive them; elsewhere this does nothing.

        Raises:
            RunInterrupted: a signal has cancelled the task.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def receive(number: int, frame: Any) -> None:  # also while the loop is busy
            signal.signal(number, AT_ONCE[signal.Signals(number)])
            self.signal = self.signal or number
            loop.call_soon_threadsafe(self._tell, number, task)

        before = {number: signal.signal(number, receive) for number in AT_ONCE}
        try:
            yield
        except asyncio.CancelledError:
            if task is None or self.signal is None:
                raise
            raise self._stopped() from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _tell(self, number: int, task: asyncio.Task | None) -> None:
        place = "" if task else " at the next safe place and saving"
        logger.warning("%s: stopping%s; the same again stops at once", signal.Signals(number).name, place)
        self._asked.set()
        if task:
            task.cancel()

    def _stopped(self) -> RunInterrupted:
        assert self.signal is not None
        return RunInterrupted(f"stopped by {signal.Signals(self.signal).name}", self.signal)

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
                raise self._stopped()
            return task.result()
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
