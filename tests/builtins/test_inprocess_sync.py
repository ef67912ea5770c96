"""The hand-over between a trainer's thread and an engine: by reference, once, and never half."""

from __future__ import annotations

import asyncio

import pytest
import torch

from miles.builtins.inprocess_sync import InProcessSync
from miles.builtins.no_engine import NoEngine
from miles.errors import EngineError, WeightSyncError
from miles.targets import import_target
from miles.types import GenerateRequest, SamplingParams

WEIGHTS = {"a": torch.arange(4.0), "b": torch.ones(3)}


class Workers:
    """One rank, in a thread of its own."""

    size = 1

    def __init__(self, fail_at=None, late=None, elsewhere=False):
        self.fail_at, self.late, self.elsewhere = fail_at, late, elsewhere
        self.walked = 0

    def stream(self):
        for name, tensor in WEIGHTS.items():
            if name == self.fail_at:
                raise ArithmeticError(f"no {name}")
            yield {name: tensor}
            self.walked += 1

    async def call(self, method, target, **arguments):
        assert method == "send_weights"
        if self.late is not None:
            raise self.late
        if not self.elsewhere:
            await asyncio.to_thread(import_target(target), self.stream(), **arguments)
        return [None]


class Engine:
    accepts = frozenset({"inprocess"})
    generates = True

    def __init__(self, fail=None):
        self.fail, self.version, self.received = fail, 0, {}

    async def receive(self, transport, version, payload):
        self.received = await asyncio.to_thread(self._walk, payload)
        self.version = version

    def _walk(self, payload):
        received = {}
        for group in payload:
            if self.fail is not None:
                raise self.fail
            received |= group
        return received


def push(workers, *engines):
    async def main():
        sync = InProcessSync()
        await sync.connect(workers, engines)
        return await asyncio.wait_for(sync.push(5), 20)

    return asyncio.run(main())


def test_tensors_arrive_by_reference():
    engine = Engine()
    metrics = push(Workers(), engine)
    assert engine.version == 5
    assert all(engine.received[name] is tensor for name, tensor in WEIGHTS.items())
    assert metrics == {"weight_sync/bytes": 4 * 4 + 3 * 4}


def test_every_engine_gets_a_walk():
    workers, engines = Workers(), [Engine(), Engine()]
    push(workers, *engines)
    assert [engine.version for engine in engines] == [5, 5]
    assert workers.walked == 2 * len(WEIGHTS)


@pytest.mark.parametrize(
    ("workers", "engine", "message"),
    [
        (Workers(fail_at="b"), Engine(), "version 5 did not arrive: ArithmeticError: no b"),
        (Workers(fail_at="a"), Engine(), "ArithmeticError: no a"),
        (Workers(late=OSError("worker died")), Engine(), "OSError: worker died"),
        (Workers(), Engine(fail=WeightSyncError("2 tensors did not arrive")), "^2 tensors did not arrive"),
        (Workers(), Engine(fail=KeyError("x")), "KeyError"),
    ],
)
def test_a_failure_of_either_side_is_an_error(workers, engine, message):
    with pytest.raises(WeightSyncError, match=message):
        push(workers, engine)
    assert engine.version == 0


def test_a_worker_in_another_process_is_told_what_to_do():
    with pytest.raises(WeightSyncError, match="another process.*--executor inprocess"):
        push(Workers(elsewhere=True), Engine())


def test_several_workers_are_refused():
    workers = Workers()
    workers.size = 2
    with pytest.raises(WeightSyncError, match="there are 2; choose another --weight-sync"):
        push(workers, Engine())


def test_an_engine_that_cannot_receive_this_way_is_refused():
    engine = Engine()
    engine.accepts = frozenset({"nccl"})
    with pytest.raises(WeightSyncError, match="Engine receives weights by nccl"):
        push(Workers(), engine)


def test_engine_none_takes_part_in_everything_but_generation():
    async def main():
        engine = NoEngine(context=None)
        sync = InProcessSync()
        workers = Workers()
        await engine.start()
        await sync.connect(workers, [engine])
        await sync.push(3)
        assert workers.walked == 0
        await engine.receive("inprocess", 4, [])
        assert (await engine.health()).weight_version == 4
        for method in (engine.abort, engine.pause, engine.resume, engine.flush_cache):
            await method()
        for method in (engine.sleep, engine.wake):
            await method(frozenset({"weights"}))
        with pytest.raises(EngineError, match="cannot generate for request 'x'.*generate: dataset"):
            await engine.generate(GenerateRequest("x", [1], SamplingParams()))
        with pytest.raises(EngineError, match="cannot score 2 tokens"):
            await engine.score([1, 2])
        await engine.close()

    asyncio.run(main())
