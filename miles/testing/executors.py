"""The contract of executors, and the worker that they are tried with."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from miles.errors import MilesError
from miles.protocols import ExecutorContext, Seats
from miles.testing.contract import ComponentContract

WORKER = f"{__name__}:Worker"


class Worker:
    """Runs wherever an executor puts it."""

    def __init__(self, rank: int, size: int, greeting: str = "hello", *, fail: int | None = None):
        if fail == rank:
            raise ValueError(f"rank {rank} cannot be built")
        self.rank, self.size, self.greeting, self.calls = rank, size, greeting, 0
        self.threads: set[int] = set()

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

    def context(self) -> ExecutorContext:
        """Groups `workers-1`, `workers-2` ... of so many workers."""
        return ExecutorContext({f"workers-{size}": Seats(size) for size in {*self.sizes, 2}})

    def each(self, use: Callable[[Any], Awaitable[None]], *arguments: Any, **keywords: Any) -> None:
        """Launch each number of workers, use the group, close everything."""

        async def main() -> None:
            for size in self.sizes:
                executor = self.build()
                try:
                    group = await executor.launch(f"workers-{size}", WORKER, *arguments, **keywords)
                    try:
                        await use(group)
                    finally:
                        await group.close()
                finally:
                    await executor.close()

        asyncio.run(main())

    def test_every_rank_answers_in_order(self) -> None:
        """Results are matched with shares of the batch by their place in the list."""

        async def use(group: Any) -> None:
            expected = [f"hi you from {rank} of {group.size}!" for rank in range(group.size)]
            assert await group.call("greet", "you", mark="!") == expected

        self.each(use, "hi")

    def test_each_rank_gets_its_own_arguments(self) -> None:
        """`call_each` hands every rank its share of the batch."""

        async def use(group: Any) -> None:
            names = [(f"no {rank}",) for rank in range(group.size)]
            expected = [f"hello no {rank} from {rank} of {group.size}." for rank in range(group.size)]
            assert await group.call_each("greet", names) == expected

        self.each(use)

    def test_arrays_and_nested_data_cross_unchanged(self) -> None:
        """Tables of samples cross to workers, columns of log-probs come back."""
        data: dict[str, Any] = {
            "tokens": [np.arange(5), np.zeros((0, 2), np.float32)],
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
            await asyncio.gather(*(group.call("count") for _ in range(5)))
            assert await group.call("count") == [6] * group.size

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

    def test_a_failure_says_what_and_where(self) -> None:
        """The error of the driver carries the worker's message and traceback: nobody finds it in a log of 64 ranks.
        The group goes on working after it."""

        async def use(group: Any) -> None:
            with pytest.raises(Exception) as caught:
                await group.call("only_on", group.size)
            told = _whole_story(caught.value)
            assert "deliberate failure of rank 0" in told, told
            assert "only_on" in told, f"the traceback of the worker is missing:\n{told}"
            assert len(await group.call("echo", 1)) == group.size

        self.each(use)

    def test_a_worker_that_cannot_be_built_is_an_error(self) -> None:
        """And not a group that hangs at its first call."""

        async def main(size: int) -> None:
            executor = self.build()
            try:
                await executor.launch(f"workers-{size}", WORKER, fail=size - 1)
            finally:
                await executor.close()

        for size in self.sizes:
            with pytest.raises(Exception, match="cannot be built"):
                asyncio.run(main(size))

    def test_a_size_it_does_not_serve_is_refused(self) -> None:
        """A configuration that cannot run is said so at its start."""
        if 2 in self.sizes:
            pytest.skip("serves several workers")
        with pytest.raises(MilesError):
            asyncio.run(self.build().launch("workers-2", WORKER))

    def test_closing(self) -> None:
        """Twice, and without anything launched: it happens on every way out of a run."""

        async def main() -> None:
            executor = self.build()
            group = await executor.launch(f"workers-{self.sizes[0]}", WORKER)
            await group.close()
            await group.close()
            await executor.close()
            await executor.close()
            await self.build().close()

        asyncio.run(main())

    def test_it_says_whether_it_shares_the_process(self) -> None:
        """Where it does, objects are handed to workers as they are: a wrong answer trains two copies."""
        marker = object()

        async def use(group: Any) -> None:
            assert all(found is marker for found in await group.call("echo", marker))

        if not self.build().shares_process:
            pytest.skip("workers run in other processes")
        self.each(use)


def _whole_story(error: BaseException) -> str:
    """Message, notes, and the same of its causes, with their tracebacks."""
    return "".join(traceback.format_exception(error))
