"""How requests and results cross between the event loop and the engine's thread, at moments that no clock decides.

Two threads run free, so *when* a request reaches the engine would be an accident; and with it the company it is
computed in, and the last bits of its log-probabilities. Two rules make it a matter of logic instead:

- Requests are handed over in batches. A batch is closed when the event loop has nothing left to do (and the driver's
  neither, where the engine lives in a worker), so it holds everything that one cause (a start, a delivery of results)
  brought about.
- Results are delivered every few engine steps, and the engine takes in what they brought about a fixed number of steps
  later, waiting for it if it must. Only one delivery is under way at a time, so each batch has one cause.

What the loop does for other reasons (sockets, timers, other threads) still arrives when it arrives.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from miles.toolkit import when_idle, with_driver

Action = Callable[[], None]


@dataclass
class Batch:
    """What crosses to the engine's thread: things to do there, in order."""

    actions: list[Action] = field(default_factory=list)
    answers_delivery: bool = False
    """Everything that the last delivery of results brought about is in it."""


class LoopSide:
    """The event loop's end. Collects actions and hands them over once the loop has settled."""

    def __init__(self, loop: asyncio.AbstractEventLoop, handed_over: Callable[[], None]):
        """`handed_over` is called after each batch."""
        self.loop, self.handed_over = loop, handed_over
        self.inbox: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._batch = Batch()
        self._settling = False

    def submit(self, action: Action) -> None:
        self._batch.actions.append(action)
        self._settle_soon()

    def deliver(self, results: list[tuple[asyncio.Future, Any]]) -> None:
        """Called in the loop on behalf of the engine: resolve futures, then answer with what comes of it."""
        for future, result in results:
            if future.done():
                continue  # its caller was cancelled
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._batch.answers_delivery = True
        self._settle_soon()

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self.loop.call_soon(when_idle, self.loop, partial(with_driver.when_settled, self._close_batch))

    def _close_batch(self) -> None:
        self._settling = False
        batch, self._batch = self._batch, Batch()
        self.inbox.put(batch)
        self.handed_over()


class EngineSide:
    """The engine thread's end. `clock` counts engine steps."""

    def __init__(self, loop_side: LoopSide, steps: int, deterministic: bool):
        self.loop_side, self.steps, self.deterministic = loop_side, steps, deterministic
        self.clock = 0
        self._due: int | None = None
        """Clock at which the answer to the delivery under way is taken in; None when there is none."""

    def hand_out(self, results: list[tuple[Any, Any]]) -> bool:
        """Deliver results, unless the last delivery has not been answered; tells whether it did."""
        if not results or (self._due is not None and self.deterministic):
            return False
        self._due = self.clock + self.steps
        self.loop_side.loop.call_soon_threadsafe(self.loop_side.deliver, results)
        return True

    def take_in(self, idle: bool) -> None:
        """Run the actions that have come and whose time it is. When an answer is due, wait for it."""
        if self._due is None or not self.deterministic:
            self._run_arrived()
        elif idle or self.clock >= self._due:
            while self._due is not None:
                self._run(self._next())

    def _run_arrived(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._run(self.loop_side.inbox.get_nowait())

    def _next(self) -> Batch:
        while self.loop_side.loop.is_running():
            with suppress(queue.Empty):
                return self.loop_side.inbox.get(timeout=1.0)
        return Batch(answers_delivery=True)  # nobody will answer any more

    def _run(self, batch: Batch) -> None:
        if batch.answers_delivery:
            self._due = None
        for action in batch.actions:
            action()
