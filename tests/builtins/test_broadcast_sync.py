"""Weights from processes to processes: who is refused, and what becomes of a push in which somebody fails."""

import asyncio
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from miles.builtins import meeting
from miles.builtins.broadcast_sync import BroadcastSync
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.local import LocalExecutor
from miles.errors import WeightSyncError
from miles.protocols import ExecutorContext, Seats
from miles.testing import WeightSyncContract, tiny
from miles.testing.syncs import PROMPT

pytest.importorskip("miles_llama")

CONTRACT = WeightSyncContract()


def stage(work, receivers=2, executor=LocalExecutor, senders=2, timeout=30.0):
    """`work(sync, workers, engines)` with train ranks in processes of their own and engines in this one."""

    async def main():
        ranks = executor(context=ExecutorContext({"train": Seats(senders)}))
        folders = [str(tiny.saved("llama", seed)) for seed in (0, 1)]
        engines = [CONTRACT.make_engine() for _ in range(receivers)]
        try:
            workers = await ranks.launch("train", "miles.testing.syncs:Sender", folders)
            for engine in engines:
                await engine.start()
            sync = BroadcastSync(context=replace(CONTRACT.context(), timeout=timeout))
            await sync.connect(workers, engines)
            await asyncio.wait_for(work(sync, workers, engines), 60)
        finally:
            for engine in engines:
                await engine.close()
            await ranks.close()

    asyncio.run(main())


async def serves(engine, model):
    np.testing.assert_allclose(await engine.score(PROMPT), CONTRACT.expected(model), atol=2e-4)


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
        began = time.monotonic()
        with pytest.raises(WeightSyncError, match="version 3 did not arrive: .*weights are asleep"):
            await sync.push(3)
        await engine.wake(frozenset({"weights"}))
        await serves(engine, 0)
        await workers.call("become", 1)
        await sync.push(4)
        await serves(engine, 1)

        copy, copied = engine.loader._copy, []

        def fails(*args):
            copied.append(args)
            if len(copied) == 3:
                raise ArithmeticError("deliberate failure of the receiver")
            copy(*args)

        monkeypatch.setattr(engine.loader, "_copy", fails)
        with pytest.raises(WeightSyncError, match="version 5 did not arrive: .*deliberate failure of the receiver"):
            await sync.push(5)
        assert (await engine.health()).weight_version == 4
        weights = load_file(tiny.saved("llama") / "model.safetensors").values()
        assert await sync.push(6) == {"weight_sync/bytes": sum(tensor.nbytes for tensor in weights)}
        await serves(engine, 1)
        assert time.monotonic() - began < 15, "somebody waited for a timeout"

    stage(work, receivers=1)


def test_a_train_rank_that_dies_is_a_sync_that_failed():
    async def work(sync, workers, engines):
        await sync.push(1)
        began = time.monotonic()
        os.kill(workers.links[0].process.pid, signal.SIGKILL)
        with pytest.raises(WeightSyncError, match="version 2 did not arrive: WorkerError: train rank 0 died"):
            await sync.push(2)
        assert time.monotonic() - began < 15, "somebody waited for a timeout"
        await serves(engines[0], 0)

    stage(work, receivers=1)


def test_an_engine_in_the_process_of_a_train_rank_is_refused():
    async def never(*arguments):
        raise AssertionError("it was connected")

    with pytest.raises(WeightSyncError, match=r"shares its process \(.*\).*use --weight-sync inprocess"):
        stage(never, receivers=1, executor=InProcessExecutor, senders=1)


def test_without_engines_nothing_is_sent():
    async def work(sync, workers, engines):
        assert await sync.push(1) == {"weight_sync/bytes": 0.0}

    stage(work, receivers=0, executor=InProcessExecutor, senders=1)
