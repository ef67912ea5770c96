"""Messages over a socket."""

import asyncio
import pickle
import socket

import numpy as np
import pytest

from miles.workers.wire import LARGE, Wire


class Local:
    """Told by name, which the other end does not know."""


def exchanged(*messages, turns=1):
    """Send messages in one turn of the loop; what arrives, as functions that load, and how many writes it took."""

    async def main():
        ours, theirs = socket.socketpair()
        arrived, done, lost, loop = [], asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

        def receive(number, load):
            arrived.append((number, load))
            if len(arrived) == len(messages):
                done.set()

        sender, receiver = Wire(receive, lambda: None), Wire(receive, lost.set)
        for wire, end in ((sender, ours), (receiver, theirs)):
            end.setblocking(False)
            await loop.create_connection(lambda wire=wire: wire, sock=end)
        writes, write = [], sender.transport.write
        sender.transport.write = lambda data: (writes.append(len(data)), write(data))
        for number, message in enumerate(messages):
            sender.post(number, message)
        await asyncio.wait_for(done.wait(), 10)
        sender.close()
        await asyncio.wait_for(lost.wait(), 10)
        receiver.close()
        return arrived, writes

    return asyncio.run(main())


def test_messages_of_one_turn_travel_together_in_order():
    arrived, writes = exchanged(*range(500))
    assert [(number, load()) for number, load in arrived] == [(n, n) for n in range(500)]
    assert len(writes) == 1


def test_large_arrays_lie_beside_the_pickle_and_are_not_copied_out():
    sent = {"a": np.arange(100_001, dtype=np.int16), "b": np.eye(300), "small": np.arange(3), "text": "ü" * LARGE}
    arrived, writes = exchanged(1, sent, [np.zeros((0, 2)), bytes(LARGE)])
    found = arrived[1][1]()
    assert all(
        np.array_equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype
        for name in ("a", "b", "small")
    )
    assert found["text"] == sent["text"]
    assert 2 * 100_001 in writes, "the array was copied into something else first"
    assert not found["a"].flags.owndata
    assert found["a"].ctypes.data % 16 == found["b"].ctypes.data % 16 == 0
    found["a"][0] = 7  # and may be written to
    assert [value.nbytes if hasattr(value, "nbytes") else len(value) for value in arrived[2][1]()] == [0, LARGE]


def test_a_message_that_cannot_be_sent_keeps_no_other_from_it():
    async def main():
        wire = Wire(lambda number, load: None, lambda: None)
        with pytest.raises(TypeError, match="pickle"):
            wire.post(1, socket.socket())
        assert wire._outbox == []

    asyncio.run(main())


def test_a_message_that_cannot_be_read_keeps_no_other_from_it(monkeypatch):
    message = Local()
    arrived, _ = exchanged("before", message, "after")
    monkeypatch.delattr(f"{__name__}.Local")
    assert arrived[0][1]() == "before"
    with pytest.raises((AttributeError, pickle.UnpicklingError)):
        arrived[1][1]()
    assert arrived[2][1]() == "after"
