"""Who works, and where: the executor, the train ranks and the engines that it started."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miles.config import Config, Spec
from miles.config.placement import Placement
from miles.errors import WorkerError
from miles.log import logger
from miles.modeling import resolve_device
from miles.protocols import Executor, ExecutorContext, RolloutEngine, Seats, WorkerGroup
from miles.registry import Registry
from miles.rollout.engine_worker import WORKER as ENGINE_WORKER
from miles.rollout.engine_worker import EngineSetup, Together, remote_engines
from miles.training.worker import ModelSetup, WorkerSetup


@dataclass
class Crew:
    """Who works, and where: the executor and the train ranks that it started."""

    config: Config
    registry: Registry
    placement: Placement
    executor: Executor
    device: str
    """As a worker sees it: a process has one accelerator."""
    stack: AsyncExitStack
    """Closes whatever they start."""
    train: WorkerGroup | None = None


def make_crew(config: Config, registry: Registry, stack: AsyncExitStack, trains: bool) -> Crew:
    """The executor with its seats; workers are launched later."""
    placement, device = Placement.of(config, registry), resolve_device(config.resources.device)
    on_gpu = int(device.startswith("cuda"))
    seats = {}
    if trains:
        seats["train"] = Seats(placement.train_ranks, on_gpu, config.resources.actor_num_nodes)
    if placement.engines == "apart" or (placement.engines == "beside" and not trains):
        seats["rollout"] = Seats(placement.num_engines, on_gpu * placement.gpus_per_engine)
    context = ExecutorContext(seats, config.run.dir, config.resources.worker_timeout)
    executor = registry.build("executors", placement.executor, context=context)
    closing(stack, executor)
    alone = executor.shares_process
    return Crew(config, registry, placement, executor, device if alone else device.partition(":")[0], stack)


async def launch_train(crew: Crew, models: Mapping[str, ModelSetup]) -> WorkerGroup:
    """Start the train ranks."""
    setup = WorkerSetup(crew.config, models, crew.device, crew.registry.plugins.provenance())
    shared = {"registry": crew.registry} if crew.executor.shares_process else {}
    crew.train = await crew.executor.launch("train", "miles.training.worker:TrainWorker", setup, **shared)
    closing(crew.stack, crew.train)
    return crew.train


def engine_setup(crew: Crew, spec: Spec, checkpoint: Path, load_weights: bool = False) -> EngineSetup:
    placed, trains = crew.placement, crew.train is not None
    return EngineSetup(
        crew.config, spec, checkpoint, crew.device, load_weights,
        provenance=crew.registry.plugins.provenance(),
        gpus=placed.gpus_per_engine,
        shares=trains and placed.engines != "apart",
        sleeps=trains and placed.offload_rollout,
    )  # fmt: skip


async def make_engine(crew: Crew, setup: EngineSetup) -> RolloutEngine:
    """Build and start an engine in this process."""
    engine = crew.registry.build("rollout_engines", setup.spec, context=setup.context(crew.registry))
    closing(crew.stack, engine)
    await engine.start()
    return engine


async def make_engines(crew: Crew, checkpoint: Path, load_weights: bool = False) -> list[Any]:
    """The rollout's engines, where the placement puts them."""
    setup = engine_setup(crew, crew.config.rollout.engine, checkpoint, load_weights)
    if crew.placement.engines in ("driver", "elsewhere"):
        return [await make_engine(crew, setup)]
    if crew.placement.engines == "beside" and crew.train is not None:
        workers = await crew.train.beside("rollout", ENGINE_WORKER, setup)
    else:
        workers = await crew.executor.launch("rollout", ENGINE_WORKER, setup)
    closing(crew.stack, workers)
    engines = await remote_engines(workers)
    closing(crew.stack, Together(engines))
    await asyncio.gather(*(engine.start() for engine in engines))
    return engines


class Closable(Protocol):
    async def close(self) -> None: ...


def closing(stack: AsyncExitStack, part: Closable) -> None:
    """Have `stack` close a part. One that cannot be closed is only logged: the first error stays the error."""

    async def close() -> None:
        try:
            await part.close()
        except WorkerError as error:  # its process has died, or will in a moment, with all that it holds
            logger.debug("%s could not be closed: %s", type(part).__name__, error)
        except Exception:
            logger.warning("%s could not be closed", type(part).__name__, exc_info=True)

    stack.push_async_callback(close)
