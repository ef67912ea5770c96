"""What crosses between driver and workers, as pickles: never Ray's own, which takes functions along and hands out
arrays that cannot be written to."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any

import ray

LARGE = 1 << 15
"""Bytes from which on a buffer is kept out of the pickle."""
HUGE = 1 << 20
"""Bytes from which on copying is left to a thread, so that the event loop goes on, and several ranks share a copy."""


@dataclass(frozen=True)
class Parcel:
    """A pickled object, with the contents of its arrays beside it so that they are not copied more than once."""

    pickled: bytes
    buffers: Sequence[Any]

    @classmethod
    def of(cls, thing: Any) -> Parcel:
        buffers: list[PickleBuffer] = []

        def keep(buffer: PickleBuffer) -> bool:
            """True for a buffer that the pickle shall hold."""
            raw = buffer.raw()
            if raw.nbytes >= LARGE:
                buffers.append(PickleBuffer(raw))
            return raw.nbytes < LARGE

        return cls(pickle.dumps(thing, 5, buffer_callback=keep), buffers)

    @property
    def nbytes(self) -> int:
        return len(self.pickled) + sum(memoryview(buffer).nbytes for buffer in self.buffers)

    async def open(self) -> Any:
        """A copy of the object, with arrays of its own."""
        return await asyncio.to_thread(self._load) if self.nbytes > HUGE else self._load()

    def _load(self) -> Any:
        return pickle.loads(self.pickled, buffers=[bytearray(buffer) for buffer in self.buffers])


class Outbox:
    """The way to the workers of a group: what several of them are sent by one call is pickled and stored once."""

    def __init__(self, readers: int):
        self.readers = readers
        self._last: tuple[tuple, asyncio.Future] | None = None
        self._served = 0

    async def send(self, *thing: Any) -> Parcel | ray.ObjectRef:
        """The parcel, or where it lies when it is big."""
        if self._last is None or not _same(self._last[0], thing):
            self._last, self._served = (thing, asyncio.ensure_future(_stored(Parcel.of(thing)))), 0
        stored = self._last[1]
        self._served += 1
        if self._served == self.readers:
            self._last = None
        return await asyncio.shield(stored)


def _same(a: tuple, b: tuple) -> bool:
    """Whether these are the very same objects: every call of a group makes its own tuple of arguments."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


async def _stored(parcel: Parcel) -> Parcel | ray.ObjectRef:
    return await asyncio.to_thread(ray.put, parcel) if parcel.nbytes > HUGE else parcel
