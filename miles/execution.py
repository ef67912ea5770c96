"""Where things run: what executors are given, and what they must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Seats:
    """What a group of workers takes."""

    workers: int
    gpus: int = 0
    """Of each worker; it sees no others."""
    nodes: int = 1
    """Machines over which they are spread evenly."""


@dataclass(frozen=True)
class ExecutorContext:
    seats: Mapping[str, Seats]
    """Of every group that will be launched, by its name, so that all can be reserved together."""
    run_dir: Path | None = None
    """Where workers' logs go, as `logs/NAME-RANK.log`; None to leave them on standard error."""
    timeout: float = 1800.0
    """Seconds after which a worker that does not answer a call is taken to hang."""


class WorkerGroup(Protocol):
    """Some identical workers, one a rank.

    Plain methods of a worker run one after the other; coroutine methods run beside them and beside each other.
    """

    size: int
    address: str
    """At which the workers' machines reach the driver's: for stores and servers in the driver."""

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run `method` on every rank with the same arguments; results in rank order. Never blocks the event loop.

        Raises:
            WorkerError: a rank failed, died or hangs; the traceback of the rank that was the first cause leads the
                message. Ranks that wait for it in vain are ended with it. An error of miles is raised as it is.
        """

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        """Like `call`, with one tuple of arguments for each rank."""

    async def call_one(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Of one rank alone, however long it takes.

        Raises:
            WorkerError: it failed or died; or while it was waited for, a process stood still for the time limit.
        """

    async def beside(self, name: str, target: str, *args: Any, **kwargs: Any) -> WorkerGroup:
        """Another object in each of these workers' processes, `Target(rank, size, ...)`, as a group of its own. The
        processes end with this group, not with that one."""

    async def close(self) -> None: ...


@runtime_checkable
class Executor(Protocol):
    """Where workers run: in this process, in processes of this machine, on a cluster. Context: `ExecutorContext`.

    What crosses to a worker is a target string (`package.module:Class`), names and data; never a pickled function.
    Processes find the environment that torchrun would give them (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
    `MASTER_PORT` ...): `torch.distributed.init_process_group` needs no arguments. None of them outlives the driver.
    """

    shares_process: bool
    """True when workers live in the driver's process, so that objects may be handed over as they are."""

    async def launch(self, name: str, target: str, *args: Any, **kwargs: Any) -> WorkerGroup:
        """Start the workers of the group `name` on its seats, each `Target(rank, size, *args, **kwargs)`."""

    async def close(self) -> None:
        """Close every group that was launched."""
