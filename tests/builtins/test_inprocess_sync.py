"""The hand-over between a trainer's thread and an engine: by reference, once, and never half."""

from __future__ import annotations

import asyncio

import pytest
import torch

from miles.builtins.inprocess_sync import ARRIVED, InProcessSync
from miles.builtins.no_engine import NoEngine
from miles.errors import EngineError, WeightSyncError
from miles.protocols import EngineHealth
from miles.shipment import Shipment, opened, this_process
from miles.targets import import_target
from miles.types import GenerateRequest, SamplingParams

WEIGHTS = {"a": torch.arange(4.0), "b": torch.ones(3)}


class Workers:
    """Ranks, in threads of this process; only the first says so."""

    def __init__(self, fail_at=None, late=None, size=1):
        self.fail_at, self.late, self.size = fail_at, late, size
        self.walked = 0

    def stream(self):
        for name, tensor in WEIGHTS.items():
            if name == self.fail_at:
                raise ArithmeticError(f"no {name}")
            yield {name: tensor}
            self.walked += 1

    async def call(self, method, target, *arguments):
        if self.late is not None and arguments:
            raise self.late
        return [await self.call_one(rank, method, target, *arguments) for rank in range(self.size)]

    async def call_one(self, rank, method, target, *arguments):
        assert method == "send_weights"
        answer = await asyncio.to_thread(import_target(target), self.stream(), *arguments)
        return answer if rank == 0 or arguments else f"rank {rank}"


class Engine:
    accepts = frozenset({"inprocess"})
    generates = True

    def __init__(self, fail=None, process=None):
        self.fail, self.version, self.received = fail, 0, {}
        self.process = process or this_process()

    async def health(self):
        return EngineHealth(self.version, 0, 0, process=self.process)

    async def receive(self, transport, version, payload):
        self.received = await asyncio.to_thread(self._walk, payload)
        self.version = version

    def _walk(self, payload):
        received = {}
        with opened(payload) as groups:
            for group in groups:
                if self.fail is not None:
                    raise self.fail
                received |= group
        return received


def push(workers, *engines):
    async def main():
        sync = InProcessSync(context=None)
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
    assert push(workers, *engines) == {"weight_sync/bytes": 2 * (4 * 4 + 3 * 4)}
    assert [engine.version for engine in engines] == [5, 5]
    assert workers.walked == 2 * len(WEIGHTS)


@pytest.mark.parametrize(
    ("workers", "engine", "message"),
    [
        (Workers(fail_at="b"), Engine(), "version 5 did not arrive: ArithmeticError: no b"),
        (Workers(fail_at="a"), Engine(), "ArithmeticError: no a"),
        (Workers(late=OSError("worker died")), Engine(), "OSError: worker died"),
        (Workers(), Engine(fail=WeightSyncError("2 tensors did not arrive")), "version 5 did not arrive: 2 tens"),
        (Workers(), Engine(fail=KeyError("x")), "KeyError"),
    ],
)
def test_a_failure_of_either_side_is_an_error(workers, engine, message):
    with pytest.raises(WeightSyncError, match=message):
        push(workers, engine)
    assert engine.version == 0


def test_what_an_engine_leaves_is_walked_to_the_end():
    """Other ranks would wait for this one's part of it."""
    workers = Workers()
    with pytest.raises(WeightSyncError, match="KeyError"):
        push(workers, Engine(fail=KeyError("x")))
    assert workers.walked == len(WEIGHTS)


def test_an_engine_in_another_process_is_told_what_to_do():
    with pytest.raises(WeightSyncError, match=r"another process \(elsewhere:7\).*--executor inprocess"):
        push(Workers(), Engine(process="elsewhere:7"))


def test_each_of_several_ranks_has_an_engine_beside_it():
    with pytest.raises(WeightSyncError, match="2 train ranks walk.*an engine beside 1 of them.*one engine a rank"):
        push(Workers(size=2), Engine())


def test_a_shipment_that_lost_its_way():
    with (
        pytest.raises(WeightSyncError, match="no train rank is in the engine's process"),
        opened(Shipment(ARRIVED, {"number": -1})),
    ):
        raise AssertionError("it was opened")


def test_an_engine_that_cannot_receive_this_way_is_refused():
    engine = Engine()
    engine.accepts = frozenset({"nccl"})
    with pytest.raises(WeightSyncError, match="Engine receives weights by nccl"):
        push(Workers(), engine)


def test_engine_none_takes_part_in_everything_but_generation():
    async def main():
        engine = NoEngine(context=None)
        sync = InProcessSync(context=None)
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
