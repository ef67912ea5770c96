"""The contract of weight syncs, between a worker that holds a tiny model and an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch import Tensor

from miles.config import Spec
from miles.errors import WeightSyncError, WorkerError
from miles.protocols import ExecutorContext, Seats, SyncContext, WeightSync, WorkerGroup
from miles.targets import import_target
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed

PROMPT = [5, 17, 3, 200]
PATIENCE = 60.0
WORKER = f"{__name__}:Sender"


class Sender:
    """A train worker as a sync sees it: it has weights, and sends them where it is told."""

    def __init__(self, rank: int, size: int, folders: list[str], **shared: Any):
        from safetensors.torch import load_file

        self.models: list[dict[str, Tensor]] = [load_file(Path(f) / "model.safetensors") for f in folders]
        self.current, self.breaks = 0, False

    def become(self, model: int, breaks: bool = False) -> None:
        """From now on hold another of the models; `breaks`: fail in the middle of sending it."""
        self.current, self.breaks = model, breaks

    def send_weights(self, target: str, *args: Any, **kwargs: Any) -> Any:
        return import_target(target)(self._stream(), *args, **kwargs)

    def _stream(self) -> Any:
        for i, group in enumerate(tiny.groups_of(self.models[self.current])):
            if self.breaks and i == 3:
                raise ArithmeticError("deliberate failure of the sender")
            yield group


class WeightSyncContract(ComponentContract):
    """`connect(workers, engines)`, `push(version)`.

    Example:
        class TestInProcess(WeightSyncContract):
            name = "inprocess"

    Needs an engine that accepts its transport, and the bridge of `model_type`: `pip install miles-llama`.
    """

    kind = "weight_syncs"
    engine: ClassVar[str] = "torch"
    """The engine that receives."""
    executor: ClassVar[str] = "inprocess"
    """Where the senders run."""
    senders: ClassVar[int] = 1
    receivers: ClassVar[int] = 2
    model_type: ClassVar[str] = "llama"

    def context(self) -> SyncContext:
        """With buckets so small that the model takes several."""
        return SyncContext(tiny.saved(self.model_type), tiny.folder("sync"), buffer_size=8192, timeout=PATIENCE / 2)

    def make_engine(self) -> Any:
        """An engine without weights."""
        config, folder = tiny.hf_config(self.model_type), tiny.saved(self.model_type)
        context = tiny.engine_context(installed(), config, folder, load_weights=False)
        return installed().build("rollout_engines", Spec(name=self.engine), context=context)

    def expected(self, seed: int) -> np.ndarray:
        return tiny.log_probs_of(tiny.model(tiny.hf_config(self.model_type), seed), PROMPT).numpy()

    def use(self, work: Callable[[WeightSync, WorkerGroup, list[Any]], Awaitable[None]]) -> None:
        """Launch senders and engines, connect them, work, close everything."""

        async def main() -> None:
            context = ExecutorContext({"train": Seats(self.senders)})
            executor = installed().build("executors", Spec(name=self.executor), context=context)
            folders = [str(tiny.saved(self.model_type, seed)) for seed in (0, 1)]
            workers = await executor.launch("train", WORKER, folders)
            engines = [self.make_engine() for _ in range(self.receivers)]
            try:
                for engine in engines:
                    await engine.start()
                sync = self.build()
                await sync.connect(workers, engines)
                await asyncio.wait_for(work(sync, workers, engines), PATIENCE)
            finally:
                for engine in engines:
                    await engine.close()
                await workers.close()
                await executor.close()

        asyncio.run(main())

    def test_its_transport_has_a_receiver(self) -> None:
        """Engines choose their receiving half by this name."""
        assert self.build().transport in self.make_engine().accepts

    def test_every_engine_serves_what_was_pushed(self) -> None:
        """On return, and not a moment later: the next request is sampled from the new policy. Three times, since
        what is set up at the first push may be used up at the second."""

        async def work(sync: WeightSync, workers: WorkerGroup, engines: list[Any]) -> None:
            for version, model in ((1, 0), (2, 1), (7, 0)):
                await workers.call("become", model)
                metrics = await sync.push(version)
                assert all(isinstance(value, int | float) for value in metrics.values())
                for engine in engines:
                    assert (await engine.health()).weight_version == version
                    np.testing.assert_allclose(await engine.score(PROMPT), self.expected(model), atol=2e-4)

        self.use(work)

    def test_engines_can_be_connected_again(self) -> None:
        """After one was replaced: the new one gets the weights too."""

        async def work(sync: WeightSync, workers: WorkerGroup, engines: list[Any]) -> None:
            await sync.push(1)
            fresh = self.make_engine()
            await fresh.start()
            try:
                await sync.connect(workers, [*engines[1:], fresh])
                await sync.push(2)
                assert (await fresh.health()).weight_version == 2
                np.testing.assert_allclose(await fresh.score(PROMPT), self.expected(0), atol=2e-4)
            finally:
                await fresh.close()

        self.use(work)

    def test_a_sender_that_fails_is_a_sync_that_failed(self) -> None:
        """The call raises (it neither hangs nor returns), no engine claims the version, and the next push works."""

        async def work(sync: WeightSync, workers: WorkerGroup, engines: list[Any]) -> None:
            await sync.push(1)
            await workers.call("become", 1, breaks=True)
            with pytest.raises((WeightSyncError, WorkerError), match="deliberate failure"):
                await sync.push(2)
            assert (await engines[0].health()).weight_version != 2
            await workers.call("become", 1)
            await sync.push(3)
            for engine in engines:
                np.testing.assert_allclose(await engine.score(PROMPT), self.expected(1), atol=2e-4)

        self.use(work)

    def test_an_engine_that_cannot_receive_is_refused(self) -> None:
        """When it is connected, with what it would accept: not in the first step, after the first rollout."""

        async def main() -> None:
            engine = self.make_engine()
            engine.accepts = frozenset({"carrier pigeon"})
            with pytest.raises(WeightSyncError, match="carrier pigeon"):
                await self.build().connect(_Nobody(), [engine])

        asyncio.run(main())

    def test_a_busy_engine_mixes_no_versions(self) -> None:
        """While requests are paused weights are swapped; each token carries the version that it was drawn from, and
        versions only grow."""
        from miles.testing.engines import request

        async def work(sync: WeightSync, workers: WorkerGroup, engines: list[Any]) -> None:
            await sync.push(1)
            task = asyncio.ensure_future(engines[0].generate(request(max_new_tokens=150)))
            await asyncio.sleep(0.01)
            await engines[0].pause("retract")
            await workers.call("become", 1)
            await sync.push(2)
            await engines[0].resume()
            result = await task
            assert result.weight_versions == sorted(result.weight_versions)
            tokens, new = [*PROMPT, *result.tokens], result.weight_versions.count(2)
            lm = tiny.model(tiny.hf_config(self.model_type), 1)
            if new:
                expected = tiny.log_probs_of(lm, tokens)[-new:]
                np.testing.assert_allclose(result.log_probs[-new:], expected, atol=2e-4)

        self.use(work)


class _Nobody:
    """A worker group that must not be called yet."""

    size = 1

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        raise AssertionError(f"{method} was called while connecting an engine that cannot receive")

    async def call_each(self, method: str, args: Any) -> list[Any]:
        return await self.call(method)

    async def close(self) -> None:
        """Nothing was started."""
