"""Messages between two processes of one machine, over a stream socket.

A message is a number and a pickle (protocol 5). Messages that are posted in the same turn of the event loop travel in
one frame: an engine is asked hundreds of things at once. Large buffers (arrays) lie in the frame beside the pickles;
the frame is received into memory of its own, and arrays that come out of it are views of that.

Frame: two uint64 (size of the index; of index and parts together), the index (a pickle of `[(number, sizes of the
message's parts), ...]`), the parts. Index and parts are padded to a multiple of 16 bytes. The first part of a message
is its pickle, the others are its buffers.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

PREFIX = struct.Struct("<QQ")
LARGE = 1 << 15
"""Bytes from which on a buffer is kept out of the pickle."""

Load = Callable[[], Any]


class Wire(asyncio.BufferedProtocol):
    """One end of the socket.

    Args:
        receive: called with the number of each message that arrives and a function that unpickles it. That may fail
            (there is no such class in this process), which concerns this message alone.
        lost: called once, when the other end has closed the socket or died.
    """

    transport: asyncio.Transport

    def __init__(self, receive: Callable[[int, Load], None], lost: Callable[[], None]):
        self._receive, self._lost = receive, lost
        self._outbox: list[tuple[int, list[Any]]] = []
        self._expect(PREFIX.size)
        self._index_size = 0

    def post(self, number: int, message: Any) -> None:
        """Send a message with all others of this turn of the loop. Raises what pickle raises for it."""
        buffers: list[memoryview] = []

        def keep(buffer: pickle.PickleBuffer) -> bool:
            """True for a buffer that the pickle shall hold."""
            raw = buffer.raw()
            if raw.nbytes >= LARGE:
                buffers.append(raw)
            return raw.nbytes < LARGE

        parts = [pickle.dumps(message, 5, buffer_callback=keep), *buffers]
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((number, parts))

    def close(self) -> None:
        self.transport.close()

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self.transport.is_closing():
            return
        index = pickle.dumps([(number, [len(part) for part in parts]) for number, parts in messages], 5)
        size = sum(_padded(len(part)) for _, parts in messages for part in parts)
        small = bytearray(PREFIX.pack(len(index), _padded(len(index)) + size))
        for part in (index, *(part for _, parts in messages for part in parts)):
            if len(part) >= LARGE:
                self.transport.write(small)
                self.transport.write(part)
                small = bytearray()
            else:
                small += part
            small += bytes(_padded(len(part)) - len(part))
        if small:
            self.transport.write(small)

    # ----------------------------------------------------------------------------------------- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._room):
            return
        frame, index_size = self._room, self._index_size
        if not index_size:
            self._index_size, size = PREFIX.unpack(frame)
            self._expect(size)
            return
        self._index_size = 0
        self._expect(PREFIX.size)
        position = _padded(index_size)
        for number, sizes in pickle.loads(frame[:index_size]):
            parts = []
            for size in sizes:
                parts.append(frame[position : position + size])
                position += _padded(size)
            self._receive(number, partial(pickle.loads, parts[0], buffers=parts[1:]))

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()

    def _expect(self, size: int) -> None:
        self._room, self._filled = np.empty(size, np.uint8).data, 0


def _padded(size: int) -> int:
    return -(-size // 16) * 16
