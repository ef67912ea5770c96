"""Engines in workers, as the driver closes them."""

import asyncio

import pytest

from miles.errors import EngineError
from miles.rollout import engine_worker
from miles.rollout.engine_worker import Together


class Engine:
    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error, self.closed = seconds, error, False

    async def close(self):
        await asyncio.sleep(self.seconds)
        if self.error:
            raise self.error
        self.closed = True


def test_engines_close_together_and_one_that_hangs_keeps_nobody(monkeypatch):
    monkeypatch.setattr(engine_worker, "CLOSING", 0.1)
    engines = [Engine(60), Engine(), Engine(60)]
    asyncio.run(asyncio.wait_for(Together(engines).close(), 5))
    assert [engine.closed for engine in engines] == [False, True, False]


def test_one_that_fails_to_close_is_told_of():
    with pytest.raises(EngineError, match="no"):
        asyncio.run(Together([Engine(), Engine(error=EngineError("no"))]).close())
