"""Environments under their limits: places, time-outs, faults, and that none holds up what is around it."""

import asyncio
import contextlib
import logging
import subprocess
import sys
import time

import pytest

from miles.api import (
    Action,
    ConfigError,
    EnvironmentFault,
    EnvironmentLimits,
    Environments,
    HookError,
    Observation,
    Prompt,
    StepResult,
    guarded,
    in_thread,
)

PROMPT = Prompt("set:0", "set", text="?")
SOON = 0.05


class World:
    """Takes its time: `reset`, `step` and `close` are seconds, or an exception to raise."""

    limits = EnvironmentLimits()

    def __init__(self, reset=0.0, step=0.0, close=0.0):
        self.takes = {"reset": reset, "step": step, "close": close}
        self.calls = []

    async def _take(self, method):
        self.calls.append(method)
        if isinstance(self.takes[method], BaseException):
            raise self.takes[method]
        await asyncio.sleep(self.takes[method])

    async def reset(self, prompt):
        await self._take("reset")
        return Observation(({"role": "user", "content": "go"},))

    async def step(self, action):
        await self._take("step")
        return StepResult(({"role": "user", "content": "on"},), 1.0)

    async def close(self):
        await self._take("close")

    def load_state_dict(self, state):
        self.calls.append(f"load {state['at']}")


async def episode(made, steps=2):
    environment = made()
    try:
        await environment.reset(PROMPT)
        for _ in range(steps):
            await environment.step(Action("a"))
            await asyncio.sleep(0.002)  # the model speaks
    finally:
        await environment.close()


def played(made, count, steps=2):
    async def main():
        await asyncio.gather(*(episode(made, steps) for _ in range(count)))

    asyncio.run(main())
    return made.metrics()


def slow():
    return World(0.004, 0.004, 0.004)


# --------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("limits", "calls_max", "episodes_max"),
    [({}, 12, 12), ({"calls": 3}, 3, 12), ({"episodes": 4}, 4, 4), ({"calls": 3, "episodes": 5}, 3, 5)],
)
def test_the_most_at_once_is_the_limit_and_is_reached(limits, calls_max, episodes_max):
    found = played(Environments(slow, EnvironmentLimits(**limits)), 12)
    assert (found["calls_max"], found["episodes_max"]) == (calls_max, episodes_max)
    assert found["calls"] == 12 * 3
    assert (found["wait_time"] > 0) == bool(limits)


def test_the_task_set_has_the_last_word_over_the_environment():
    def modest():
        world = slow()
        world.limits = EnvironmentLimits(calls=2, episodes=5)
        return world

    found = played(Environments(modest, EnvironmentLimits(episodes=4)), 12)
    assert (found["calls_max"], found["episodes_max"]) == (2, 4)


def test_metrics_are_of_the_time_since_they_were_asked_for():
    made = Environments(slow)
    assert made.metrics() == {}
    assert played(made, 3)["calls_max"] == 3
    assert played(made, 1)["calls_max"] == 1
    assert made.metrics() == {}


def test_a_call_waits_for_its_place_longer_than_its_time_out():
    """Otherwise a limit would make faults."""
    made = Environments(lambda: World(step=0.1), EnvironmentLimits(calls=1, step_timeout=0.6))
    assert played(made, 8, steps=1)["timeouts"] == 0  # the last one waits 0.7 seconds


def test_whoever_waits_for_a_place_and_is_cancelled_takes_none():
    async def main():
        made = Environments(lambda: World(step=0.05), EnvironmentLimits(calls=1, episodes=2))
        tasks = [asyncio.ensure_future(episode(made, 1)) for _ in range(5)]
        await asyncio.sleep(0.02)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(episode(made, 1) for _ in range(2)))
        return made

    made = asyncio.run(main())
    assert made.calls.taken == made.episodes.taken == 0


def test_an_environment_that_goes_on_takes_a_place_of_the_open_ones():
    async def main():
        made = Environments(World, EnvironmentLimits(episodes=1))
        environment = made()
        await environment.resume({"at": 3})
        assert environment.calls == ["load 3"]
        assert made.episodes.taken == 1
        await environment.close()
        await environment.close()
        assert made.episodes.taken == 0

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------- time-outs, faults


@pytest.mark.parametrize(("method", "before"), [("reset", []), ("step", ["reset"])])
def test_a_call_that_takes_too_long_is_a_fault(method, before):
    limits = EnvironmentLimits(reset_timeout=SOON, step_timeout=SOON)
    worlds = []
    made = Environments(lambda: worlds.append(World(**{method: 60})) or worlds[-1], limits)
    with pytest.raises(EnvironmentFault, match=f"World .*`{method}` took longer than 0.05 s") as caught:
        asyncio.run(episode(made))
    assert caught.value.facts["method"] == method
    assert caught.value.facts["kind"] == "timeout"
    assert SOON <= caught.value.facts["seconds"] < 10
    assert worlds[0].calls == [*before, method, "close"]
    found = made.metrics()
    assert (found["timeouts"], found["errors"]) == (1, 0)


@pytest.mark.parametrize("error", [KeyError("k"), TimeoutError("mine"), asyncio.CancelledError(), SystemExit(3)])
def test_what_it_raises_is_a_fault(error):
    made = Environments(lambda: World(step=error))
    with pytest.raises(EnvironmentFault) as caught:
        asyncio.run(episode(made))
    assert caught.value.facts["kind"] == "error"
    found = made.metrics()
    assert (found["timeouts"], found["errors"]) == (0, 1)


def test_a_broken_constructor_is_counted():
    made = Environments(lambda: World(nothing=1))
    with pytest.raises(TypeError):
        made()
    assert made.metrics()["errors"] == 1


@pytest.mark.parametrize("close", [60, OSError("gone")])
def test_closing_costs_nobody_a_trajectory(close, caplog):
    caplog.set_level(logging.WARNING)
    made = Environments(lambda: World(close=close), EnvironmentLimits(close_timeout=SOON))
    found = played(made, 3)
    assert found["close_errors"] == 3
    assert made.episodes.taken == 0
    [line] = caplog.messages
    assert "World" in line
    assert "closing" in line


def test_a_cancelled_trajectory_stops_its_step_and_is_closed():
    async def main():
        world = World(step=60)
        task = asyncio.ensure_future(episode(Environments(lambda: world)))
        await asyncio.sleep(SOON)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert world.calls == ["reset", "step", "close"]

    asyncio.run(main())


STUBBORN = """
import asyncio, time
from miles.api import *

class Stubborn:
    async def reset(self, prompt):
        return Observation(({"role": "user", "content": "go"},))

    async def step(self, action):
        while True:
            try:
                await in_thread(time.sleep, 3600)
            except asyncio.CancelledError:
                print("no", flush=True)

    async def close(self):
        await self.step(None)

async def main():
    environment = Environments(Stubborn, EnvironmentLimits(step_timeout=0.05, close_timeout=0.05))()
    await environment.reset(Prompt("a", "a"))
    try:
        await environment.step(Action(""))
    except EnvironmentFault as fault:
        print(fault.facts["kind"])
    await environment.close()

asyncio.run(main())
print("over")
"""


def test_one_that_heeds_no_cancellation_and_hangs_in_a_thread_does_not_hold_up_the_end():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["no", "timeout", "no", "over"]
    assert time.perf_counter() - started < 60


def test_a_trajectory_that_is_cancelled_twice_leaves_a_stubborn_step_behind():
    """As by Ctrl-C, and Ctrl-C again while the step is being given its second."""

    async def main():
        freed = asyncio.Event()

        class Stubborn(World):
            async def step(self, action):
                while not freed.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await freed.wait()

        task = asyncio.ensure_future(episode(Environments(Stubborn)))
        await asyncio.sleep(SOON)
        before = asyncio.all_tasks()
        task.cancel()
        await asyncio.sleep(SOON)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        freed.set()
        assert len(before) == 3  # this one, the trajectory, its step
        assert not left, "the end of the loop would wait for it"

    asyncio.run(main())


def test_a_hung_environment_leaves_the_event_loop_alone():
    """While one hangs, others are played."""

    async def main():
        hung = asyncio.ensure_future(episode(Environments(lambda: World(step=60)), 1))
        await asyncio.gather(*(episode(Environments(World)) for _ in range(5)))
        assert not hung.done()
        hung.cancel()
        await asyncio.gather(hung, return_exceptions=True)

    asyncio.run(main())


def test_who_keeps_the_event_loop_to_itself_is_noted():
    class Blocking(World):
        async def step(self, action):
            await asyncio.sleep(0.001)
            time.sleep(0.05)
            await asyncio.sleep(1)
            return StepResult((), 1.0)

    found = played(Environments(Blocking), 1, steps=1)
    assert 0.05 <= found["blocked_max"] < 0.9


def test_in_thread_takes_arguments_and_raises_what_the_function_raises():
    async def main():
        assert await in_thread(divmod, 7, 2) == (3, 1)
        assert await in_thread(sorted, [1, 2], reverse=True) == [2, 1]
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 1, 0)

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------ what it is told


def test_what_is_not_of_the_protocol_is_the_environments_own():
    environment = guarded(World())
    assert environment.takes["step"] == 0.0
    assert hasattr(environment, "load_state_dict")
    assert not hasattr(environment, "state_dict")
    assert guarded(environment) is environment


def test_limits_that_are_none():
    class Wrong(World):
        limits = {"calls": 3}

    with pytest.raises(HookError, match=r"Wrong .*`limits` are dict .*EnvironmentLimits are expected"):
        guarded(Wrong())
    with pytest.raises(ConfigError, match=r"calls=0\): must be more than 0"):
        EnvironmentLimits(calls=0)
    with pytest.raises(ConfigError, match=r"step_timeout=-1"):
        EnvironmentLimits(step_timeout=-1)
