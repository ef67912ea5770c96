"""Who takes part in a sync, and how several come to one end."""

import asyncio
import time

import pytest

from miles.builtins import sync_partners
from miles.builtins.sync_partners import AbandonedError, rounds, together, walked
from miles.protocols import EngineHealth


class Engine:
    def __init__(self, process):
        self.process = process

    async def health(self):
        return EngineHealth(0, 0, 0, process=self.process)


def test_engines_that_share_a_process_have_rounds_of_their_own():
    """Those that cannot say where they are share none."""
    engines = [Engine(process) for process in ("a", "b", "a", "", "a", "", "b")]
    found = [list(members) for members in asyncio.run(rounds(engines))]
    assert found == [["a", "b", "engine 3", "engine 5"], ["a", "b"], ["a"]]


async def answer(value, after=0.0):
    await asyncio.sleep(after)
    if isinstance(value, Exception):
        raise value
    return value


def test_what_all_return():
    assert asyncio.run(together([answer(1, 0.02), answer(2)])) == [1, 2]


def test_the_first_cause_is_raised_when_all_have_ended():
    """An echo came first, then its cause."""
    told, began = [], time.monotonic()
    parts = [answer(1, 0.2), answer(AbandonedError("because of x"), 0.02), answer(KeyError("x"), 0.05)]
    with pytest.raises(KeyError, match="x"):
        asyncio.run(together(parts, lambda part, error: told.append((part, str(error)))))
    assert told == [(1, "because of x")]
    assert time.monotonic() - began >= 0.2


def test_who_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(sync_partners, "PATIENCE", 0.05)
    with pytest.raises(KeyError):
        asyncio.run(asyncio.wait_for(together([answer(1, 100), answer(KeyError("x"))]), 10))


def test_a_walk_goes_to_the_end():
    seen = []
    weights = ({str(i): seen.append(i)} for i in range(4))
    with pytest.raises(IndexError), walked(weights) as walk:
        seen[len([next(walk)])]
    assert seen == [0, 1, 2, 3]
