"""No session outlives its trajectory, whatever ends that."""

import asyncio
import time
from dataclasses import replace

import pytest
from miles_openreward.environment import OpenReward, SessionError
from miles_openreward.plugin import OpenRewardOptions

from miles.api import Action, Environments, Prompt, ToolCall

STEP = Action("", tool_calls=(ToolCall("move", {"by": 30}, "call_0"),))


@pytest.fixture
def slow(url, worlds, nobody_left):
    """An environment, and the prompt of its task: `goal` 1 takes half a second to open, others 30 seconds a step."""

    def make(goal=2):
        return OpenReward(OpenRewardOptions(base_url=url)), Prompt("s:0", "s", metadata=worlds.row("Slow", goal))

    return make


def test_a_step_that_takes_too_long(slow, worlds):
    async def main():
        environment, prompt = slow()
        await environment.reset(prompt)
        assert len(worlds.OPEN) == 1
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(environment.step(STEP), 0.3)
        await environment.close()
        assert not worlds.OPEN

    asyncio.run(main())


def test_an_opening_that_is_cancelled(slow):
    """The server goes on with it: what comes of it has to be closed all the same."""

    async def main():
        environment, prompt = slow(goal=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(environment.reset(prompt), 0.2)
        await environment.close()

    asyncio.run(main())


def test_a_trajectory_that_is_cancelled_twice(slow, worlds):
    """As by Ctrl-C, and Ctrl-C again: closing is cut short, and the keeper does it when the loop ends."""

    async def trajectory(environment, prompt):
        try:
            await environment.reset(prompt)
            await environment.step(STEP)
        finally:
            await environment.close()

    async def main():
        tasks = [asyncio.create_task(trajectory(*slow())) for _ in range(5)]
        while len(worlds.OPEN) < 5:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(("status", "closings"), [(500, 1), (403, 1), (404, 0), (410, 0)])
def test_a_session_that_its_server_does_not_end_is_counted(slow, worlds, monkeypatch, caplog, status, closings):
    """The SDK says nothing of it. One that is gone has ended."""
    monkeypatch.setenv("FLOOR_KEY", "open-sesame-17")
    monkeypatch.setitem(worlds.REFUSED, "/delete", status)

    async def main():
        made = Environments(lambda: OpenReward(replace(slow()[0].options, secrets=("floor_key",))))
        environment = made()
        await environment.reset(slow()[1])
        await environment.close()
        return made.metrics()["close_errors"]

    assert asyncio.run(main()) == closings
    assert ("cannot, with [floor_key]" in caplog.text) == bool(closings)
    assert "open-sesame-17" not in caplog.text


def test_a_server_that_does_not_answer_is_not_waited_for(slow, worlds, monkeypatch):
    monkeypatch.setattr("miles_openreward.sessions.PATIENCE", 0.2)

    async def main():
        environment, prompt = slow()
        await environment.reset(prompt)
        leave = environment.session.sdk._pre_delete
        monkeypatch.setattr(environment.session.sdk, "_pre_delete", lambda: asyncio.sleep(60))
        with pytest.raises(SessionError, match="did not end its session within 0.2 s"):
            await environment.close()
        await leave()

    asyncio.run(main())


def test_what_nobody_closed_is_closed_when_the_loop_ends(slow, worlds):
    async def main():
        environment, prompt = slow()
        await environment.reset(prompt)
        assert len(worlds.OPEN) == 1

    asyncio.run(main())


def test_what_the_server_does_not_end_when_the_loop_ends_is_said(slow, worlds, monkeypatch, caplog):
    monkeypatch.setitem(worlds.REFUSED, "/delete", 500)

    async def main():
        environment, prompt = slow()
        await environment.reset(prompt)

    asyncio.run(main())
    assert "not ended, and go on until their server hears too little of them: 1 (" in caplog.text
    assert "open-sesame-17" not in caplog.text


def test_a_keyboard_interrupt_through_the_loop(slow, worlds):
    async def main():
        environment, prompt = slow()
        await environment.reset(prompt)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


def test_steps_wait_side_by_side(slow, worlds):
    """Ten steps of 0.5 seconds take not much longer than one."""

    async def one():
        environment, prompt = slow()
        await environment.reset(prompt)
        started = time.monotonic()
        await environment.step(Action("", tool_calls=(ToolCall("move", {"by": 1}, "c"),)))
        await environment.close()
        return time.monotonic() - started

    async def main():
        return await asyncio.gather(*(one() for _ in range(10)))

    assert max(asyncio.run(main())) < 5
