"""Requests that are under way, and whoever waits for something to happen to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from miles.api import PauseMode


class Signal:
    """Wakes those who wait for a condition, to look at it again."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], object], seconds: float | None = None) -> bool:
        """Whether it holds; False when the time is up."""
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                return bool(condition())
            finally:
                self._waiting.discard(waiter)
        return True


class Flight:
    """One request, from its arrival to its answer."""

    def __init__(self, id: str, key: str):
        self.id, self.key = id, key
        self.rid = ""
        """Under which a server has it; empty while none does."""
        self.begun = False
        """A server has or had it."""
        self.aborted = False
        self.retracted = False
        """The server was told to abort it, and the rest is asked for later."""
        self.limit: asyncio.Timeout | None = None
        """Of the time that its server has, while that runs."""

    def interrupt(self) -> None:
        """Its time is up now."""
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time())


class Flights:
    """All of an engine, and the gate that they pass on their way to a server: open unless the engine is paused, or gets
    new weights."""

    def __init__(self) -> None:
        self.all: set[Flight] = set()
        self.mode: PauseMode | None = None
        self.receiving = False
        self.gate = Signal()
        """For those that wait at the gate, or before another try."""
        self.traffic = Signal()
        """For those that wait for requests to leave a server, or to end."""

    @property
    def open(self) -> bool:
        return not (self.mode or self.receiving)

    @property
    def out(self) -> list[Flight]:
        """Those that servers have."""
        return [flight for flight in self.all if flight.rid]

    @contextmanager
    def one(self, id: str, key: str) -> Iterator[Flight]:
        """From its arrival to its end. Requests of one key go to one server."""
        flight = Flight(id, key)
        self.all.add(flight)
        try:
            yield flight
        finally:
            self.all.discard(flight)
            self.traffic.tell()

    @contextmanager
    def sent(self, flight: Flight, rid: str) -> Iterator[None]:
        """While a server has it."""
        flight.rid, flight.begun, flight.retracted = rid, True, False
        try:
            yield
        finally:
            flight.rid = ""
            self.traffic.tell()
