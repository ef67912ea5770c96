"""An engine in a worker process, and what stands for it in the driver."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from miles.config import Config, Spec
from miles.config.components import needs_of
from miles.modeling import bridge_for, load_hf_config, load_tokenizer, precision_for
from miles.protocols import EngineContext, WorkerGroup
from miles.registry import Registry
from miles.workers.entry import enter

WORKER = f"{__name__}:EngineWorker"
CLOSING = 5.0
"""Seconds that engines have to close by themselves."""


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is built from; everything in it can cross to another process."""

    config: Config
    spec: Spec
    checkpoint: Path
    device: str
    load_weights: bool
    provenance: Sequence[Mapping[str, Any]] = ()
    """The driver's plugins, to compare with."""
    gpus: int = 1
    shares: bool = False
    sleeps: bool = False
    """As `EngineContext` says."""

    def context(self, registry: Registry, rank: int = 0) -> EngineContext:
        config, trust = self.config, self.config.model.trust_remote_code
        hf_config = load_hf_config(self.checkpoint, trust)
        return EngineContext(
            checkpoint=self.checkpoint,
            hf_config=hf_config,
            tokenizer=load_tokenizer(self.checkpoint, trust),
            bridge=bridge_for(registry, config, hf_config),
            device=self.device,
            dtype=config.train.dtype,
            load_weights=self.load_weights,
            run_dir=config.run.dir,
            precision=precision_for(registry, config),
            rank=rank,
            gpus=self.gpus,
            shares=self.shares,
            sleeps=self.sleeps,
            routed_experts="routed_experts" in needs_of(config, registry, "moe"),
            exact=config.exact,
        )


class EngineWorker:
    """The engine's process."""

    def __init__(self, rank: int, size: int, setup: EngineSetup):
        registry = enter(setup.config, rank, setup.provenance)
        registry.plugins.hook.miles_on_worker_start(role="rollout", rank=rank, config=setup.config)
        self.engine = registry.build("rollout_engines", setup.spec, context=setup.context(registry, rank))

    async def facts(self) -> dict[str, Any]:
        """What the driver must know of the engine: its plain attributes, and the names of its coroutines."""
        names = [name for name in dir(self.engine) if not name.startswith("_")]
        coroutines = [name for name in names if inspect.iscoroutinefunction(getattr(self.engine, name))]
        plain: dict[str, Any] = {n: getattr(self.engine, n) for n in ("accepts", "generates", "max_len") if n in names}
        return {**plain, "coroutines": frozenset(coroutines)}

    def __getattr__(self, name: str) -> Any:
        """All else that is called here is the engine's."""
        return getattr(self.__dict__["engine"], name)


class RemoteEngine:
    """Stands for the engine of one worker: whatever coroutine it offers can be awaited here."""

    def __init__(self, workers: WorkerGroup, rank: int, facts: Mapping[str, Any]):
        self._workers, self._rank = workers, rank
        self.__dict__.update(facts)

    async def start(self, method: str = "start") -> None:
        """Some facts are known only then: how many tokens fit beside the weights."""
        await self._workers.call_one(self._rank, method)
        self.__dict__.update(await self._workers.call_one(self._rank, "facts"))

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("coroutines", ()):
            return partial(self.start, name) if name == "restart" else partial(self._workers.call_one, self._rank, name)
        raise AttributeError(f"the engine in worker {self._rank} has no {name!r}")


@dataclass(frozen=True)
class Together:
    """Engines of one group, which end with their processes if they do not close by themselves."""

    engines: Sequence[RemoteEngine]

    async def close(self) -> None:
        closing = [asyncio.ensure_future(engine.close()) for engine in self.engines]
        closed, hanging = await asyncio.wait(closing, timeout=CLOSING)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*closed)


async def remote_engines(workers: WorkerGroup) -> list[Any]:
    """One for each worker of a group of `EngineWorker`s, not started yet."""
    return [RemoteEngine(workers, rank, facts) for rank, facts in enumerate(await workers.call("facts"))]
