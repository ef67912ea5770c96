"""Executor `local`: every worker is a process of this machine, with the GPUs of its seat and a log of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from miles.api import ConfigError, ExecutorContext, Seats
from miles.toolkit import ProcessLink, Workers, torchrun_environment

HERE = "127.0.0.1"
LOOPBACK = ("lo", "lo0")
"""What the machine's network with itself is called, on Linux and elsewhere."""


class LocalExecutor:
    """Raises ConfigError for more machines than one, or more GPUs than there are."""

    shares_process = False

    def __init__(self, *, context: ExecutorContext):
        self.context = context
        self._gpus = _shared_out(context.seats)
        self._groups: list[Workers] = []
        self._stores: list[TCPStore] = []

    async def launch(self, name: str, target: str, *args: Any, **kwargs: Any) -> Workers:
        size, links = self.context.seats[name].workers, list[ProcessLink]()
        store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        group: Workers | None = None
        try:
            for rank in range(size):
                environment = self._environment(name, rank, store.port)
                links.append(await ProcessLink.start(name, rank, size, environment, self._log(name, rank)))
            group = Workers(name, links, address=HERE, timeout=self.context.timeout)
            self._groups.append(group)
            return await Workers.build(group, target, args, kwargs)
        except BaseException:
            await asyncio.gather(*(link.stop() for link in links))
            raise

    async def close(self) -> None:
        await asyncio.gather(*(group.close() for group in self._groups))
        self._stores.clear()

    def _log(self, name: str, rank: int) -> Path | None:
        run_dir = self.context.run_dir
        return run_dir / "logs" / f"{name}-{rank}.log" if run_dir else None

    def _environment(self, name: str, rank: int, port: int) -> dict[str, str]:
        size = self.context.seats[name].workers
        threads = _cores() // sum(seats.workers for seats in self.context.seats.values())
        return {
            "OMP_NUM_THREADS": str(max(threads, 1)),
            **_own_network(),
            **os.environ,
            **torchrun_environment(rank, size, rank, size, HERE, port),
            "CUDA_VISIBLE_DEVICES": ",".join(self._gpus[name][rank]),
        }


def _own_network() -> dict[str, str]:
    """What keeps gloo within the machine. By itself it asks what the machine's name resolves to, which may be an
    address of another machine, or take a name server's time."""
    names = [name for _, name in socket.if_nameindex() if name in LOOPBACK]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shared_out(seats: Mapping[str, Seats]) -> dict[str, list[Sequence[str]]]:
    """The GPUs of every worker of each group, by the names that CUDA_VISIBLE_DEVICES has for them."""
    for name, group in seats.items():
        if group.nodes > 1:
            raise ConfigError(
                f"resources.executor: local is one machine, and {name} workers are asked for on {group.nodes}; choose "
                "--executor ray, or lower --actor-num-nodes to 1"
            )
    wanted = {name: group.workers * group.gpus for name, group in seats.items()}
    total, visible = sum(wanted.values()), _visible_gpus() if any(wanted.values()) else []
    if total > len(visible):
        parts = " + ".join(f"{count} for {name}" for name, count in wanted.items() if count)
        raise ConfigError(
            f"resources.executor: local needs {parts} = {total} GPUs, and this machine shows {len(visible)}; ask for "
            "fewer ranks or engines, or take --colocate or --device cpu"
        )
    rest = iter(visible)
    return {
        name: [list(itertools.islice(rest, group.gpus)) for _ in range(group.workers)] for name, group in seats.items()
    }


def _visible_gpus() -> list[str]:
    count, said = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return said.split(",")[:count] if said else [str(number) for number in range(count)]
