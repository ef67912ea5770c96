"""The contract of executors, and the worker that they are tried with."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import pytest

from miles.errors import MilesError, WorkerError
from miles.protocols import ExecutorContext, Seats
from miles.testing.contract import ComponentContract

WORKER = f"{__name__}:Worker"
Use = Callable[[Any], Awaitable[None]]


class Worker:
    """Runs wherever an executor puts it."""

    def __init__(self, rank: int, size: int, greeting: str = "hello", *, fail: int | None = None):
        if fail == rank:
            raise ValueError(f"rank {rank} cannot be built")
        self.rank, self.size, self.greeting, self.calls, self.guests = rank, size, greeting, 0, 0
        self.threads: set[int] = set()
        self.released = threading.Event()

    def greet(self, name: str, mark: str = ".") -> str:
        return f"{self.greeting} {name} from {self.rank} of {self.size}{mark}"

    def count(self) -> int:
        """Slow enough that two at once would meet."""
        calls = self.calls
        time.sleep(0.01)
        self.calls = calls + 1
        self.threads.add(threading.get_ident())
        return self.calls

    def echo(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def only_on(self, rank: int) -> int:
        """Fails on every rank but one."""
        if self.rank != rank:
            raise ZeroDivisionError(f"deliberate failure of rank {self.rank}")
        return rank

    def hold(self, seconds: float) -> bool:
        """Whether somebody called `release` meanwhile."""
        return self.released.wait(seconds)

    async def release(self) -> None:
        self.released.set()

    async def meet(self, guests: int, seconds: float) -> bool:
        """Whether so many calls of this method were under way together."""
        self.guests += 1
        for _ in range(round(seconds / 0.01)):
            if self.guests >= guests:
                return True
            await asyncio.sleep(0.01)
        return False

    def where(self) -> tuple[str, int]:
        return socket.gethostname(), os.getpid()

    def add_up(self) -> tuple[str, float]:
        """`RANK`, and the sum of all ranks, which meet as the environment says."""
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        total = torch.tensor(float(self.rank))
        dist.all_reduce(total)
        return os.environ["RANK"], total.item()

    def fetch(self, address: str, port: int) -> bytes:
        """What a server says first."""
        with socket.create_connection((address, port), timeout=10) as connection:
            return connection.recv(100)

    def die(self, rank: int) -> None:
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)


class Kept:
    """Groups that several tests use, one of each size."""

    def __init__(self, contract: ExecutorContract):
        self.runner, self.executor = asyncio.Runner(), contract.build()
        try:
            self.groups = self.runner.run(self.launch(contract.sizes))
        except BaseException:
            self.close()
            raise

    async def launch(self, sizes: Sequence[int]) -> list[Any]:
        return await asyncio.gather(*(self.executor.launch(f"workers-{size}", WORKER, "hi") for size in sizes))

    def close(self) -> None:
        with self.runner:
            self.runner.run(self.executor.close())


class ExecutorContract(ComponentContract):
    """`launch(name, target, ...) -> WorkerGroup`, `close()`.

    Example:
        class TestLocal(ExecutorContract):
            name = "local"
            sizes = (1, 2)
    """

    kind = "executors"
    sizes: ClassVar[Sequence[int]] = (1, 2)
    """Numbers of workers that must be launched."""
    patience: ClassVar[float] = 60.0
    """Seconds after which something that should have ended has hung."""
    timeout = 600.0
    """Seconds that the executor is told to wait for the answer to a call."""
    _kept: ClassVar[Kept | None] = None

    def context(self) -> ExecutorContext:
        """Groups `workers-1`, `workers-2` ... of so many workers."""
        return ExecutorContext({f"workers-{size}": Seats(size) for size in {*self.sizes, 2}}, timeout=self.timeout)

    def each(self, use: Use) -> None:
        """Use a group of each number of workers that other tests use, too."""
        cls = type(self)
        cls._kept = kept = cls._kept or Kept(self)
        try:
            for group in kept.groups:
                kept.runner.run(asyncio.wait_for(use(group), self.patience))
        except BaseException:
            self.teardown_class()
            raise

    def afresh(self, use: Use) -> None:
        """Use a group of the largest size that nobody else uses, and see that its processes end with it."""
        self.teardown_class()

        async def main() -> None:
            executor = self.build()
            try:
                group = await executor.launch(f"workers-{max(self.sizes)}", WORKER)
                await use(group)
            finally:
                await executor.close()

        asyncio.run(main())

    @classmethod
    def teardown_class(cls) -> None:
        kept, cls._kept = cls._kept, None
        if kept:
            kept.close()

    def processes_or_skip(self) -> None:
        if self.build().shares_process:
            pytest.skip("workers live in the driver's process")

    # ------------------------------------------------------------------------------------------------ calls and answers

    def test_every_rank_answers_in_order(self) -> None:
        """Results are matched with shares of the batch by their place in the list."""

        async def use(group: Any) -> None:
            expected = [f"hi you from {rank} of {group.size}!" for rank in range(group.size)]
            assert await group.call("greet", "you", mark="!") == expected

        self.each(use)

    def test_each_rank_gets_its_own_arguments(self) -> None:
        """`call_each` hands every rank its share of the batch."""

        async def use(group: Any) -> None:
            names = [(f"no {rank}",) for rank in range(group.size)]
            expected = [f"hi no {rank} from {rank} of {group.size}." for rank in range(group.size)]
            assert await group.call_each("greet", names) == expected

        self.each(use)

    def test_one_rank_is_called_alone(self) -> None:
        """Each engine gets requests of its own."""

        async def use(group: Any) -> None:
            before, last = await group.call("count"), group.size - 1
            assert await group.call_one(last, "greet", "you", mark="?") == f"hi you from {last} of {group.size}?"
            await group.call_one(last, "count")
            assert await group.call("count") == [count + 1 + (rank == last) for rank, count in enumerate(before)]

        self.each(use)

    def test_arrays_and_nested_data_cross_unchanged(self) -> None:
        """Tables of samples cross to workers, columns of log-probs come back."""
        data: dict[str, Any] = {
            "tokens": [np.arange(5), np.zeros((0, 2), np.float32), np.arange(100_000.0).reshape(2, -1)],
            "mask": (1, None, "ü", float("inf")),
        }

        async def use(group: Any) -> None:
            for found in await group.call("echo", data):
                assert found["mask"] == data["mask"]
                for a, b in zip(found["tokens"], data["tokens"], strict=True):
                    assert a.dtype == b.dtype
                    assert np.array_equal(a, b)

        self.each(use)

    def test_calls_to_a_rank_follow_one_another(self) -> None:
        """A train rank is no thread-safe object: calls made together must not meet in it."""

        async def use(group: Any) -> None:
            before = await group.call("count")
            await asyncio.gather(*(group.call("count") for _ in range(5)))
            assert await group.call("count") == [count + 6 for count in before]

        self.each(use)

    def test_coroutine_methods_run_beside_all_others(self) -> None:
        """An engine answers many requests at once, and is paused while they run; a train rank may be at work beside."""

        async def use(group: Any) -> None:
            held, _ = await asyncio.gather(group.call("hold", self.patience / 4), group.call("release"))
            assert all(held), "a coroutine method waited for a plain one"
            met = await asyncio.gather(
                group.call("meet", 2, self.patience / 4), group.call("meet", 2, self.patience / 4)
            )
            assert all(map(all, met)), "a coroutine method waited for another"

        self.each(use)

    def test_the_event_loop_is_not_blocked(self) -> None:
        """While the trainer works, engines, rewards and environments go on."""

        async def use(group: Any) -> None:
            ticks, working = 0, asyncio.ensure_future(group.call("sleep", 0.2))
            while not working.done():
                await asyncio.sleep(0.01)
                ticks += 1
            await working
            assert ticks >= 5, f"the event loop had {ticks} turns while a worker slept for 0.2 s"

        self.each(use)

    def test_a_call_that_is_given_up_leaves_the_group_as_it_is(self) -> None:
        """A run that is interrupted saves its state through the same workers."""

        async def use(group: Any) -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(group.call("sleep", 0.2), 0.05)
            assert await group.call("echo", 1) == [1] * group.size

        self.each(use)

    def test_another_object_lives_beside(self) -> None:
        """An engine in each train rank's process: they hand weights over without a copy."""

        async def use(group: Any) -> None:
            other = await group.beside("other", WORKER, "ahoy")
            assert other.size == group.size
            assert await other.call("greet", "you") == [
                f"ahoy you from {rank} of {other.size}." for rank in range(other.size)
            ]
            assert await other.call("where") == await group.call("where")
            with pytest.raises(Exception, match="cannot be built"):
                await group.beside("third", WORKER, fail=0)
            await other.close()
            assert (await group.call("greet", "you"))[0] == f"hi you from 0 of {group.size}."

        self.each(use)

    def test_workers_reach_the_driver(self) -> None:
        """At `address`: stores and servers live in the driver."""

        async def use(group: Any) -> None:
            async def serve(reader: Any, writer: asyncio.StreamWriter) -> None:
                writer.write(b"the driver")
                writer.close()

            async with await asyncio.start_server(serve, "0.0.0.0", 0) as server:
                port = server.sockets[0].getsockname()[1]
                assert await group.call("fetch", group.address, port) == [b"the driver"] * group.size

        self.each(use)

    def test_ranks_find_each_other(self) -> None:
        """By the variables that torchrun sets: `init_process_group` needs no arguments."""
        self.processes_or_skip()

        async def use(group: Any) -> None:
            total = float(sum(range(group.size)))
            assert await group.call("add_up") == [(str(rank), total) for rank in range(group.size)]

        self.each(use)

    def test_it_says_whether_it_shares_the_process(self) -> None:
        """Where it does, objects are handed to workers as they are: a wrong answer trains two copies."""
        marker = object()

        async def use(group: Any) -> None:
            assert all(found is marker for found in await group.call("echo", marker))

        if not self.build().shares_process:
            pytest.skip("workers run in other processes")
        self.each(use)

    # --------------------------------------------------------------------------------------------------------- failures

    def test_a_failure_says_what_and_where(self) -> None:
        """The error of the driver carries the worker's message and traceback: nobody finds it in a log of 64 ranks.
        The group goes on working after it."""

        async def use(group: Any) -> None:
            with pytest.raises(Exception) as caught:
                await group.call("only_on", group.size)
            told = "".join(traceback.format_exception(caught.value))
            assert "deliberate failure of rank 0" in told, told
            assert "only_on" in told, f"the traceback of the worker is missing:\n{told}"
            assert len(await group.call("echo", 1)) == group.size

        self.each(use)

    def test_a_worker_that_cannot_be_built_is_an_error(self) -> None:
        """And not a group that hangs at its first call."""
        self.teardown_class()

        async def main(size: int) -> None:
            executor = self.build()
            try:
                await executor.launch(f"workers-{size}", WORKER, fail=size - 1)
            finally:
                await executor.close()

        with pytest.raises(Exception, match="cannot be built"):
            asyncio.run(main(max(self.sizes)))

    def test_a_size_it_does_not_serve_is_refused(self) -> None:
        """A configuration that cannot run is said so at its start."""
        if 2 in self.sizes:
            pytest.skip("serves several workers")
        with pytest.raises(MilesError):
            asyncio.run(self.build().launch("workers-2", WORKER))

    def test_a_worker_that_dies_is_an_error(self) -> None:
        """Of the call under way and of all later ones, and not a call that never ends."""
        self.processes_or_skip()

        async def use(group: Any) -> None:
            last = group.size - 1
            assert os.getpid() not in [pid for _, pid in await group.call("where")], "it is the driver"
            with pytest.raises(WorkerError, match=rf"rank {last} died"):
                await asyncio.wait_for(group.call("die", last), self.patience)
            with pytest.raises(WorkerError, match=rf"rank {last} died"):
                await asyncio.wait_for(group.call("echo", 1), self.patience)

        self.afresh(use)

    def test_a_worker_that_hangs_is_an_error(self) -> None:
        """After the time limit; it says where the worker stands, and ends the processes."""
        self.processes_or_skip()
        self.timeout = 1.0
        processes = []

        async def use(group: Any) -> None:
            processes.extend(await group.call("where"))
            with pytest.raises(WorkerError, match=r"time\.sleep") as caught:
                await asyncio.wait_for(group.call("sleep", 4 * self.patience), self.patience)
            assert "no answer" in str(caught.value)
            await self._gone(processes)

        self.afresh(use)

    def test_closing(self) -> None:
        """Twice, and without anything launched: it happens on every way out of a run. No process is left behind."""
        self.teardown_class()

        async def main() -> None:
            executor = self.build()
            launches = (executor.launch(f"workers-{size}", WORKER) for size in self.sizes)
            first, *others = await asyncio.gather(*launches)
            processes, elsewhere = await first.call("where"), [await group.call("where") for group in others]
            await first.close()
            await first.close()
            await self._gone(processes)
            assert [await group.call("where") for group in others] == elsewhere
            await executor.close()
            await executor.close()
            await self._gone([process for group in elsewhere for process in group])
            await self.build().close()

        asyncio.run(main())

    async def _gone(self, processes: Sequence[tuple[str, int]]) -> None:
        """Wait until those of this machine are."""
        here = (socket.gethostname(), os.getpid())
        left = [pid for host, pid in processes if host == here[0] and pid != here[1]]
        for _ in range(round(self.patience / 0.05)):
            left = [pid for pid in left if _exists(pid)]
            if not left:
                return
            await asyncio.sleep(0.05)
        pytest.fail(f"processes {left} are still there")


def _exists(pid: int) -> bool:
    """Ended ones that nobody has asked for their exit code do, too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
