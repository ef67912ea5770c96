"""Has a cause had all its effects? Event loops that have come to rest, in this process and in the driver's.

What a worker answers makes the driver do things, some of which come back as calls: a finished response frees the place
of the next request. *When* they come is an accident of two processes. Whoever must not depend on it (an engine whose
batches decide the last bits of its numbers) waits until the driver has told that it has nothing more to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HOPS = 100
"""Turns of an event loop after which it is taken to have come to rest even if it is still busy."""


def when_idle(loop: asyncio.AbstractEventLoop, act: Callable[[], None], hops: int = 0) -> None:
    """Call `act` when no callback is waiting to run. A loop that does not tell (uvloop) is taken to be busy: it gets
    its turns first."""
    if hops < HOPS and len(getattr(loop, "_ready", (None,))) > 0:
        loop.call_soon(when_idle, loop, act, hops + 1)
    else:
        act()


class Conversation:
    """How much a worker and its driver have said to each other. The worker's end: `called`, `answered` and `heard` are
    told of every call that came, every answer that went, and every time the driver came to rest."""

    def __init__(self) -> None:
        self.calls = self.answers = 0
        self._known = (0, 0)
        self._waiting: list[Callable[[], None]] = []

    def called(self) -> None:
        self.calls += 1

    def answered(self) -> None:
        self.answers += 1

    def heard(self, calls: int, answers: int) -> None:
        """The driver is at rest, has made so many calls and heard so many answers."""
        self._known = (calls, answers)
        if self.settled:
            waiting, self._waiting = self._waiting, []
            for act in waiting:
                act()

    @property
    def settled(self) -> bool:
        return self._known == (self.calls, self.answers)

    def when_settled(self, act: Callable[[], None]) -> None:
        """Call `act` when both sides know of all calls and answers; at once if they do."""
        if self.settled:
            act()
        else:
            self._waiting.append(act)


with_driver = Conversation()
"""That of this process; in the driver's own, nothing is ever said."""
