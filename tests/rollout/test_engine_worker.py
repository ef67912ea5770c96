"""Engines in workers, as the driver closes them."""

import asyncio

import pytest

from miles.errors import EngineError
from miles.rollout import engine_worker
from miles.rollout.engine_worker import EngineWorker, RemoteEngine, Together, remote_engines


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


class Growing:
    """Knows its limit once it has started."""

    accepts, generates, max_len = frozenset({"disk"}), True, None

    async def start(self):
        self.max_len = 7

    async def score(self, tokens):
        return len(tokens)


class Here:
    """Workers in this process."""

    def __init__(self, *engines):
        self.workers = []
        for engine in engines:
            worker = EngineWorker.__new__(EngineWorker)
            worker.engine = engine
            self.workers.append(worker)

    async def call(self, method):
        return [await self.call_one(rank, method) for rank in range(len(self.workers))]

    async def call_one(self, rank, method, *args):
        return await getattr(self.workers[rank], method)(*args)


def test_what_stands_for_an_engine_knows_what_the_engine_knows_after_its_start():
    async def main():
        first, second = await remote_engines(Here(Growing(), Growing()))
        assert isinstance(first, RemoteEngine)
        assert (first.accepts, first.generates, first.max_len) == (frozenset({"disk"}), True, None)
        await first.start()
        assert (first.max_len, second.max_len) == (7, None)
        assert await first.score([1, 2]) == 2
        with pytest.raises(AttributeError, match="has no 'restart'"):
            _ = first.restart

    asyncio.run(main())


class Shrinking(Growing):
    """Finds less memory when it starts again."""

    async def restart(self):
        self.max_len -= 2


def test_and_after_it_was_started_again():
    async def main():
        (engine,) = await remote_engines(Here(Shrinking()))
        await engine.start()
        await engine.restart()
        assert engine.max_len == 5

    asyncio.run(main())
