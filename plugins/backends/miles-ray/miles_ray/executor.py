"""Executor `ray`: every worker is an actor of a Ray cluster."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore

from miles.api import ConfigError, ExecutorContext, WorkerError
from miles.toolkit import WorkerFailure, Workers, torchrun_environment
from miles_ray.actor import Actor, Place, Surroundings
from miles_ray.cluster import join
from miles_ray.link import RayLink
from miles_ray.parcel import Outbox
from miles_ray.placement import Reservation, Seat
from miles_ray.plugin import RayOptions
from miles_ray.versions import differences, versions

AT_ONCE = 100_000
"""Requests that a worker takes at the same time: more than an engine will ever have. Ray's own limit, 1000, would stop
those that the others wait for."""
START = 600.0
"""Seconds that actors have to start at least, however short the time limit of calls is."""
PASSED_ON = ("NCCL_", "NVSHMEM_", "GLOO_", "TORCH_", "PYTORCH_", "CUBLAS_", "MILES_", "OMP_", "HF_")
"""Beginnings of environment variables that workers get from the driver."""
KEPT_BACK = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Not those that end like this: Ray keeps what it is given in plain text."""
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Unless the driver's environment says otherwise: NVLink multicast wants rights that containers often lack, and what
fails without them is the whole group."""


class RayExecutor:
    """Joins or starts a cluster, reserves room for all groups at the first launch, and starts actors in it."""

    shares_process = False

    def __init__(self, options: RayOptions | None = None, *, context: ExecutorContext):
        self.options, self.context = options or RayOptions(), context
        if self.options.cpus_per_worker <= 0:
            raise ConfigError("cpus_per_worker of executor ray must be above 0: Ray reserves no room for nothing")
        self._leave: Callable[[], None] | None = None
        self._started = False
        self._room: Reservation | None = None
        self._joining = asyncio.Lock()
        self._groups: list[Workers] = []
        self._stores: list[TCPStore] = []

    async def launch(self, name: str, target: str, *args: Any, **kwargs: Any) -> Workers:
        await self._join()
        assert self._room is not None
        seats, address = self._room.seats[name], ray.util.get_node_ip_address()
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        log_dir = self._log_dir()
        outbox, links = Outbox(len(seats)), []
        environments = _environments(seats, address, store.port, _threads(self._room))
        for rank, environment in enumerate(environments):
            actor = self._actor(name, rank, seats, environment)
            log = log_dir / f"{name}-{rank}.log" if log_dir else None
            links.append(RayLink(name, rank, actor, seats[rank].node, outbox, log))
        group = Workers(name, links, address=address, timeout=self.context.timeout)
        self._groups.append(group)
        try:
            await self._enter(links, log_dir)
            return await Workers.build(group, target, args, kwargs)
        except BaseException:
            for link in links:
                link.kill()
            raise

    async def close(self) -> None:
        groups, self._groups = self._groups, []
        await asyncio.gather(*(group.close() for group in groups))
        self._stores.clear()
        if self._room is not None:
            self._room.release()
            self._room = None
        if self._leave is not None:
            self._leave()
            self._leave = None

    async def _join(self) -> None:
        async with self._joining:
            if self._leave is None:
                self._leave, self._started = join(self.options.address, log_to_driver=self.context.run_dir is None)
            if self._room is None:
                options = self.options
                room = Reservation(
                    self.context.seats, options.cpus_per_worker, options.placement_timeout, self._started
                )
                await room.reserve()
                self._room = room

    def _log_dir(self) -> Path | None:
        if self.context.run_dir is None:
            return None
        directory = self.context.run_dir.absolute() / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _actor(self, name: str, rank: int, seats: Sequence[Seat], environment: dict[str, str]) -> Any:
        gpus, seat = self.context.seats[name].gpus, seats[rank]
        env = {**environment, **_passed_on(self.options.env), **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
        options = ray.remote(Actor).options(
            num_cpus=self.options.cpus_per_worker,
            num_gpus=gpus,
            max_concurrency=AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(seat.placement, seat.bundle),
            runtime_env={"env_vars": env},
        )
        return options.remote(rank, len(seats))

    async def _enter(self, links: Sequence[RayLink], log_dir: Path | None) -> None:
        """Start all actors, and compare their versions with those here.

        Raises:
            WorkerError: one does not start.
            ConfigError: one has other versions.
        """
        with _marked(log_dir) as mark:
            path, here = [entry or os.getcwd() for entry in sys.path], os.getcwd()
            limit = max(self.context.timeout, START)
            entering = [link.enter(Surroundings(path, here, link.log, mark)) for link in links]
            try:
                async with asyncio.timeout(limit):
                    places: list[Place] = await asyncio.gather(*entering)
            except WorkerFailure as error:
                text, rank = error.failure.text, error.failure.rank
                hint = "Every machine of the cluster needs the same packages as this one, miles-ray among them."
                raise WorkerError(f"{links[0].name} rank {rank} does not start:\n{text}\n{hint}") from None
            except TimeoutError:
                raise WorkerError(f"{links[0].name}: no actor of Ray within {limit:g} s") from None
        if lines := differences(versions(), {place.node: place.versions for place in places}):
            told = "\n".join(f"  {line}" for line in lines)
            raise ConfigError(f"workers have other versions than the driver; install the same everywhere:\n{told}")


def _threads(room: Reservation) -> dict[str, int]:
    """CPU threads of each worker, by node: workers of all groups share the cores."""
    workers = Counter(seat.node for seats in room.seats.values() for seat in seats)
    cores = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes()}
    return {node: max(int(cores.get(node, 0)) // count, 1) for node, count in workers.items()}


def _environments(
    seats: Sequence[Seat], address: str, port: int, threads: Mapping[str, int]
) -> Iterator[dict[str, str]]:
    """What torchrun would tell each rank; its rank among those of its node is counted from 0."""
    on_node = Counter(seat.node for seat in seats)
    counts = {node: itertools.count() for node in on_node}
    for rank, seat in enumerate(seats):
        local = next(counts[seat.node])
        environment = torchrun_environment(rank, len(seats), local, on_node[seat.node], address, port)
        yield {"OMP_NUM_THREADS": str(threads[seat.node]), **environment}


def _passed_on(names: Sequence[str]) -> dict[str, str]:
    """Of the driver's environment variables, those that workers get."""
    found = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON) and not k.endswith(KEPT_BACK)}
    return {**NO_MULTICAST, **found, **{name: os.environ[name] for name in names if name in os.environ}}


@contextmanager
def _marked(directory: Path | None) -> Iterator[Path | None]:
    """A file that shows to workers whether they see this directory."""
    if directory is None:
        yield None
        return
    mark = directory / f".{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink()
