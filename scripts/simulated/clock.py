"""An event loop on a clock of its own: hours of waiting take no time, and every run of a program is the same.

Its `time()` stands still while callbacks run, and jumps to the next timer when nothing is left to run. So what code
does costs nothing on this clock; only what it waits for does. While a thread works for the loop (`asyncio.to_thread`)
the clock stands still too.

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

PATIENCE = 10.0
"""Real seconds for a thread that nobody counted, when there is no timer."""


class Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """A selector that does not wait for a time to come: it moves the clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.threads = 0
        """At work for the loop: they may have something to say before the next timer."""

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.threads:
            return super().select(None)
        if timeout is None:
            if ready := super().select(PATIENCE):
                return ready
            raise RuntimeError("nothing is left to wait for: every task waits for another one")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = Jumping()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self.clock.threads += 1
        future.add_done_callback(self._came_back)
        return future

    def _came_back(self, future: Any) -> None:
        self.clock.threads -= 1
