"""Trajectories are uploaded, or they are not: a run does not notice."""

import asyncio
import contextlib
import logging
import time

import pytest
from fastapi import FastAPI, Request
from miles_openreward import upload
from miles_openreward.environment import OpenReward
from miles_openreward.plugin import OpenRewardOptions

from miles.api import Action, Prompt, ToolCall

KEY = "sk-of-the-account"


class Site:
    """What openreward.ai does with rollouts, or fails to do."""

    def __init__(self, delay=0.0, fails=False):
        self.events, self.keys, self.delay, self.fails = [], set(), delay, fails
        self.app = FastAPI()
        self.app.post("/v1/rollouts")(self.take)

    async def take(self, request: Request):
        await asyncio.sleep(self.delay)
        if self.fails:
            raise RuntimeError("out of order")
        self.keys.add(request.headers["x-api-key"])
        self.events += (await request.json())["events"]
        return {}


@pytest.fixture
def uploading(url, worlds, monkeypatch, nobody_left):
    """Play an episode whose trajectory goes to a site; returns the seconds that closing took, and the uploader."""
    with contextlib.ExitStack() as stack:

        def run(site, *actions, **options):
            monkeypatch.setenv("OPENREWARD_API_KEY", KEY)
            monkeypatch.setenv("OPENREWARD_API_URL", stack.enter_context(worlds.served(site.app)))
            uploader = upload.Uploader()
            monkeypatch.setattr("miles_openreward.environment.uploader", lambda: uploader)
            seconds = asyncio.run(episode(*actions, run_name="mine", **options))
            return seconds, uploader

        async def episode(*actions, **options):
            environment = OpenReward(OpenRewardOptions(base_url=url, **options))
            await environment.reset(Prompt("s:0", "s", metadata=worlds.row("Counter", 4)))
            for action in actions:
                await environment.step(action)
            started = time.monotonic()
            await environment.close()
            return time.monotonic() - started

        yield run


def move(by, reasoning=""):
    return Action("", reasoning, (ToolCall("move", {"by": by}, "call_0"),))


def test_a_trajectory_as_the_site_shows_it(uploading):
    site = Site()
    _, uploader = uploading(site, Action("Hm."), move(3, "Three?"), move(1), system_prompt_template="{tools}")
    uploader.drain()
    uploader.api.close()
    started = next(event for event in site.events if event["eventType"] == "rollout")
    assert (started["runName"], started["environment"], started["split"]) == ("mine", "Counter", "train")
    assert started["task_spec"] == {"goal": 4}
    (update,) = [event for event in site.events if event["eventType"] == "rollout_update"]
    assert update["rollout_info"]["task_index"] == 3
    messages = sorted((e for e in site.events if e["eventType"] == "message"), key=lambda e: e["index"])
    shown = [(e["type"], e.get("content"), e.get("reward"), e["isFinished"]) for e in messages]
    assert shown[0][0] == "system_message"
    assert shown[1:] == [
        ("user_message", "Reach 4.\nBegin at 0.", None, False),
        ("assistant_message", "Hm.", None, False),
        ("user_message", "That called no tool. Go on by calling one.", None, False),
        ("reasoning", "Three?", None, False),
        ("tool_call", '{"by": 3}', None, False),
        ("tool_result", "at 3", 0.25, False),
        ("tool_call", '{"by": 1}', None, False),
        ("tool_result", "at 4", 1.0, True),
    ]
    ids = [e["callId"] for e in messages if "callId" in e]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert site.keys == {KEY}


@pytest.mark.parametrize("site", [Site(fails=True), Site(delay=60)], ids=["fails", "hangs"])
def test_a_site_that_does_not_work_costs_a_run_nothing(uploading, site):
    seconds, _ = uploading(site, move(4))
    assert seconds < 2  # the time of closing the session


def test_what_the_sdk_cannot_begin_is_said_once(uploading, caplog, monkeypatch):
    site = Site()
    monkeypatch.setattr(site, "take", None)
    site.app = FastAPI()  # knows no rollouts
    with caplog.at_level(logging.WARNING, "miles"):
        _, uploader = uploading(site, move(4))
        uploader.put(upload.Transcript({"run_name": "mine"}))
        uploader.drain()
    assert [r.getMessage() for r in caplog.records if r.name == "miles"] == [
        "openreward: not all trajectories are uploaded, and the run goes on: the SDK could not begin one"
    ]


def test_more_than_can_be_uploaded_is_left_out_and_nobody_waits(uploading, caplog, monkeypatch):
    monkeypatch.setattr(upload, "THREADS", 0)
    _, uploader = uploading(Site(), move(4))
    small = upload.Uploader(waiting=2)
    with caplog.at_level(logging.WARNING, "miles"):
        started = time.monotonic()
        for _ in range(100):
            small.put(upload.Transcript({"run_name": "mine"}))
        assert time.monotonic() - started < 1
    assert small._queue.qsize() == 2
    assert "faster than openreward.ai takes them" in caplog.text
    for idle in (small, uploader):  # nobody works on these: the end of the process shall not wait for them
        idle._queue.unfinished_tasks = 0


def test_an_uploader_that_cannot_begin_leaves_no_session_open(url, worlds, monkeypatch, nobody_left):
    monkeypatch.setenv("OPENREWARD_API_KEY", KEY)
    monkeypatch.setattr("miles_openreward.environment.uploader", lambda: 1 / 0)

    async def main():
        environment = OpenReward(OpenRewardOptions(base_url=url, run_name="mine"))
        await environment.reset(Prompt("s:0", "s", metadata=worlds.row("Counter", 4)))
        await environment.step(move(4))
        with pytest.raises(ZeroDivisionError):
            await environment.close()
        assert not worlds.OPEN

    asyncio.run(main())


def test_nothing_is_uploaded_unless_asked(url, worlds, monkeypatch, nobody_left):
    monkeypatch.setattr("miles_openreward.environment.uploader", lambda: pytest.fail("it is"))

    async def main():
        environment = OpenReward(OpenRewardOptions(base_url=url))
        await environment.reset(Prompt("s:0", "s", metadata=worlds.row("Counter", 4)))
        await environment.step(move(4))
        await environment.close()

    asyncio.run(main())
