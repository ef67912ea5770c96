"""A worker process from the inside."""

import asyncio
import threading
import time
import traceback

import pytest

from miles.toolkit import WorkerHost
from miles.workers.failure import without_plumbing


class Target:
    def __init__(self, rank, size, start=0):
        self.rank, self.size, self.count, self.begun = rank, size, start, threading.Event()

    def add(self, number=1, seconds=0.0):
        self.begun.set()
        time.sleep(seconds)
        self.count += number
        return self.count

    def exhausted(self):
        return next(iter(()))

    async def wait_for(self, count):
        while self.count < count:
            await asyncio.sleep(0.001)
        return self.count


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr("builtins.Target", Target, raising=False)
    return "builtins:Target"


def hosted(body, target):
    async def main():
        host = WorkerHost(1, 2)
        await host.build("0", target, (), {"start": 5})
        return await body(host)

    return asyncio.run(main())


def call(host, method, *args):
    return host.call("0", method, args, {})


def test_coroutine_methods_run_beside_plain_ones(target):
    async def body(host):
        return await asyncio.gather(
            call(host, "wait_for", 7), call(host, "wait_for", 6), call(host, "add"), call(host, "add")
        )

    seven, six_or_more, *added = hosted(body, target)
    assert (seven, added) == (7, [6, 7])
    assert six_or_more >= 6


def test_a_plain_method_that_is_given_up_is_done_all_the_same(target):
    """The other ranks do theirs: one that left it out would keep them waiting in a collective."""

    async def body(host):
        first, second = (asyncio.ensure_future(call(host, "add", 1, 0.05)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        second.cancel()
        return await call(host, "add")

    assert hosted(body, target) == 8


def test_a_pulse_is_felt_in_the_thread_that_computes(target):
    async def body(host):
        working = asyncio.ensure_future(call(host, "add", 1, 0.05))
        await asyncio.to_thread(host.objects["0"].begun.wait)
        await host.pulse()
        counted = host.objects["0"].count
        await working
        return counted

    assert hosted(body, target) == 6


def test_stop_iteration_is_an_error_like_others(target):
    with pytest.raises(RuntimeError, match="StopIteration"):
        hosted(lambda host: asyncio.wait_for(call(host, "exhausted"), 5), target)


def test_stacks_show_the_computing_thread_first_and_no_idle_ones(target):
    async def body(host):
        idle = await host.stacks()
        working = asyncio.ensure_future(call(host, "add", 1, 0.2))
        await asyncio.to_thread(host.objects["0"].begun.wait)
        busy = await host.stacks()
        await working
        return idle, busy

    idle, busy = hosted(body, target)
    assert "miles-compute" not in idle
    assert busy.startswith("thread miles-compute_0:\n  File ")
    first = busy.splitlines()[1]
    assert first.endswith(", in add"), "begins with the worker's own method"
    assert "time.sleep(seconds)" in busy


def test_stacks_leave_out_what_traces_threads():
    python, tracer = threading.__file__, "/site-packages/opentelemetry/instrumentation/threading/__init__.py"
    frames = [(path, 1, "run", "") for path in (python, tracer, python, "ours.py", tracer)]
    kept = without_plumbing(traceback.StackSummary.from_list(frames))
    assert [frame.filename for frame in kept] == ["ours.py", tracer]


def test_what_is_dropped_is_gone_after_the_calls_before_it(target):
    async def body(host):
        last = asyncio.ensure_future(call(host, "add", 1, 0.02))
        await asyncio.sleep(0.001)
        await host.drop("0")
        return await last, dict(host.objects)

    assert hosted(body, target) == (6, {})
