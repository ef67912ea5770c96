"""Weights from processes to processes: who is refused, and what becomes of a push in which somebody fails."""

import asyncio
import os
import signal
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from miles.builtins import meeting
from miles.builtins.broadcast_sync import BroadcastSync
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.local import LocalExecutor
from miles.builtins.sync_partners import PATIENCE
from miles.config import Config, Spec
from miles.errors import WeightSyncError, WorkerError
from miles.protocols import ExecutorContext, Seats
from miles.rollout.engine_worker import WORKER, EngineSetup, remote_engines
from miles.testing import WeightSyncContract, installed, tiny
from miles.testing.syncs import PROMPT

pytest.importorskip("miles_llama")

CONTRACT = WeightSyncContract()


def stage(work, receivers=1, executor=LocalExecutor):
    """`work(sync, workers, engines)` with a train rank in a process of its own and engines in this one."""

    async def main():
        ranks = executor(context=ExecutorContext({"train": Seats(1)}))
        folders = [str(tiny.saved("llama", seed)) for seed in (0, 1)]
        engines = [CONTRACT.make_engine() for _ in range(receivers)]
        try:
            workers = await ranks.launch("train", "miles.testing.syncs:Sender", folders)
            for engine in engines:
                await engine.start()
            sync = BroadcastSync(context=CONTRACT.context())
            await sync.connect(workers, engines)
            await asyncio.wait_for(work(sync, workers, engines), 120)
        finally:
            for engine in engines:
                await engine.close()
            await ranks.close()

    asyncio.run(main())


async def serves(engine, model):
    np.testing.assert_allclose(await engine.score(PROMPT), CONTRACT.expected(model), atol=2e-4)


async def fails(sync, version, why, error=WeightSyncError):
    """At once: whoever waits for somebody who is not coming waits longer than this takes."""
    began = time.monotonic()
    with pytest.raises(error, match=f"(?s)version {version} did not arrive: {why}"):
        await sync.push(version)
    assert time.monotonic() - began < PATIENCE


def test_a_receiver_that_fails_is_a_sync_that_failed(monkeypatch):
    """Before it takes anything, and halfway: the sender gets through, the error is the receiver's, and the next push
    arrives."""

    async def work(sync, workers, engines):
        (engine,) = engines
        await sync.push(1)
        groups = {key: name for key, (name, _) in meeting._kept.items()}
        await sync.push(2)
        assert groups == {key: name for key, (name, _) in meeting._kept.items()}, "the group was not kept"

        await engine.sleep(frozenset({"weights"}))
        await fails(sync, 3, ".*weights are asleep")
        await engine.wake(frozenset({"weights"}))
        await serves(engine, 0)
        await workers.call("become", 1)
        await sync.push(4)
        await serves(engine, 1)

        copy, copied = engine.loader._copy, []

        def breaks(*args):
            copied.append(args)
            if len(copied) == 3:
                raise ArithmeticError("deliberate failure of the receiver")
            copy(*args)

        monkeypatch.setattr(engine.loader, "_copy", breaks)
        await fails(sync, 5, ".*deliberate failure of the receiver")
        assert (await engine.health()).weight_version == 4
        weights = load_file(tiny.saved("llama") / "model.safetensors").values()
        assert await sync.push(6) == {"weight_sync/bytes": sum(tensor.nbytes for tensor in weights)}
        await serves(engine, 1)

    stage(work)


def test_engines_in_workers_of_their_own():
    """All in one group: when one of them refuses, the other leaves without waiting, and both are there next time."""
    checkpoint = tiny.saved("llama")
    config = Config.model_validate({"model": {"hf_checkpoint": str(checkpoint)}, "run": {"num_threads": 1}})
    setup = EngineSetup(config, Spec(name="torch"), checkpoint, "cpu", False, installed().plugins.provenance())

    async def work(sync, workers, _):
        executor = LocalExecutor(context=ExecutorContext({"rollout": Seats(2)}))
        try:
            engines = await remote_engines(await executor.launch("rollout", WORKER, setup))
            await asyncio.gather(*(engine.start() for engine in engines))
            await sync.connect(workers, engines)
            await sync.push(1)
            await engines[0].sleep(frozenset({"weights"}))
            await workers.call("become", 1)
            await fails(sync, 2, ".*weights are asleep")
            await serves(engines[1], 0)
            await engines[0].wake(frozenset({"weights"}))
            await workers.call("become", 1, breaks=True)
            await fails(sync, 3, ".*deliberate failure of the sender", WorkerError)
            await workers.call("become", 1)
            await sync.push(4)
            for engine in engines:
                assert (await engine.health()).weight_version == 4
                await serves(engine, 1)
            assert (await engines[0].checksums()) == (await engines[1].checksums())
        finally:
            await executor.close()

    stage(work, receivers=0)


def test_a_train_rank_that_dies_is_a_sync_that_failed():
    async def work(sync, workers, engines):
        await sync.push(1)
        os.kill(workers.links[0].process.pid, signal.SIGKILL)
        await fails(sync, 2, "train rank 0 died", WorkerError)
        await serves(engines[0], 0)

    stage(work)


def test_an_engine_in_the_process_of_a_train_rank_is_refused():
    async def never(*arguments):
        raise AssertionError("it was connected")

    with pytest.raises(WeightSyncError, match=r"shares its process \(.*\).*use --weight-sync inprocess"):
        stage(never, executor=InProcessExecutor)


def test_without_engines_nothing_is_sent():
    async def work(sync, workers, engines):
        assert await sync.push(1) == {"weight_sync/bytes": 0.0}

    stage(work, receivers=0, executor=InProcessExecutor)
