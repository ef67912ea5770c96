"""The environments of a task set: one set of limits over all its trajectories, and faults as data."""

import asyncio
import re
from types import SimpleNamespace

import pytest

from miles.config import Config, TaskSet
from miles.evaluate import RolloutEvaluator
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.rollout.gate import Gate
from miles.rollout.task import Task
from miles.types import Action, GenerateResult, Group, Observation, Prompt, Sample, Status, StepResult

PROMPT = Prompt(id="s:0", task_set="s", text="x", tokens=[1, 2])


class Chat:
    stop_token_ids = (9,)
    end_of_turn_id = 9

    def parse(self, tokens, finish_reason):
        return Action("")

    def render_next(self, messages, closed):
        return [6]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class Engine:
    """Takes a millisecond; is aborted by whoever closes the gate."""

    generates = True

    def __init__(self):
        self.aborted = asyncio.Event()

    async def generate(self, request):
        try:
            await asyncio.wait_for(self.aborted.wait(), 0.001)
        except TimeoutError:
            return GenerateResult([5, 9], [-1.0, -2.0], "stop", [3, 3])
        return GenerateResult([5], [-1.0], "abort", [3])

    async def abort(self, request_id=None):
        self.aborted.set()
        await asyncio.sleep(0)
        self.aborted.clear()


def make(environment, **limits):
    registry = Registry(load_plugins())
    registry.add("environments", "world", environment)
    task_set = TaskSet(environment="world", reward="environment", environment_limits=limits)
    return Task(task_set, Config(), registry, Gate([Engine()], 64), Chat())


def group_of(size, number=0):
    samples = [Sample.begin(PROMPT, id=size * number + i, group_id=number, seed=i) for i in range(size)]
    return Group(number, PROMPT, samples)


def run(task, group, attempts):
    return asyncio.run(task.run_group(group, attempts, lambda sample, attempt: 7))


class Sluggish:
    """A step takes 5 ms; the first one of all hangs."""

    steps = 0

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        Sluggish.steps += 1
        await asyncio.sleep(60 if Sluggish.steps == 1 else 0.005)
        return StepResult((), 1.0, done=True)

    async def close(self):
        pass


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Sluggish, "steps", 0)


def test_limits_hold_over_all_trajectories_of_a_task_set():
    task = make(Sluggish, step_timeout=1, calls=3, episodes=5)

    async def main():
        groups = [group_of(4, number) for number in range(6)]
        await asyncio.gather(*(task.run_group(group, 2, lambda s, a: 7) for group in groups))
        return [sample for group in groups for sample in group.samples]

    samples = asyncio.run(main())
    found = task.environment_metrics()
    assert (found["calls_max"], found["episodes_max"]) == (3, 5)
    assert (found["timeouts"], found["errors"], found["calls"]) == (1, 0, 2 * 25)
    assert {s.reward for s in samples} == {1.0}
    [again] = [s for s in samples if "retried" in s.metadata]
    assert "`step` took longer than 1 s (environment_limits.step_timeout)" in again.metadata["retried"][0]


def test_a_time_out_is_data():
    hung, *others = run(make(Sluggish, step_timeout=1), group_of(4), attempts=1).samples
    assert hung.status is Status.FAILED
    assert re.match(r"environment Sluggish \(.*\): `step` took longer than 1 s", hung.error)
    assert hung.metadata["environment_fault"]["kind"] == "timeout"
    assert hung.metadata["environment_fault"]["method"] == "step"
    assert {s.status for s in others} == {Status.COMPLETED}


def test_evaluation_tells_the_same():
    task = make(Sluggish, step_timeout=1, calls=1)
    site = SimpleNamespace(config=Config(), load_prompts=lambda task_set: [PROMPT], eval_task=lambda task_set: task)
    found = asyncio.run(RolloutEvaluator()._evaluate_set(site, task.set))
    told = {name: found[f"environment/{name}"] for name in ("calls", "calls_max", "timeouts", "errors")}
    assert told == {"calls": 4, "calls_max": 1, "timeouts": 1, "errors": 0}  # the second attempt came to an end
    assert found["accuracy"] == 1.0


class Counting:
    """Two steps, then it is done; can be put back."""

    def __init__(self):
        self.steps = 0

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        self.steps += 1
        await asyncio.sleep(0.001)
        return StepResult(({"role": "user", "content": "on"},), 1.0, done=self.steps == 2)

    async def close(self):
        pass

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("limit", ["episodes", "calls"])
def test_who_still_waits_when_the_rollout_ends_begins_nothing(limit):
    """A reset may start a machine: nobody would speak to it."""
    resets = []

    class Starting(Counting):
        async def reset(self, prompt):
            resets.append(task.front.closed)
            await asyncio.sleep(0.01)
            return await super().reset(prompt)

    task = make(Starting, **{limit: 2})
    gate, group = task.front, group_of(8)

    async def main():
        running = asyncio.ensure_future(task.run_group(group, 1, lambda s, a: 0))
        await asyncio.sleep(0.005)
        await gate.close()
        half = await running
        begun, statuses = list(resets), [sample.status for sample in half.samples]
        gate.open()
        return begun, statuses, await task.run_group(half, 1, lambda s, a: 0)

    begun, statuses, whole = asyncio.run(main())
    assert begun == [False, False]
    assert statuses == [Status.PENDING] * 8
    assert {s.reward for s in whole.samples} == {2.0}
    assert len(resets) == 2 + 6  # those that were begun are put back


def test_a_sample_that_waits_in_vain_to_begin_again_is_as_it_was():
    """It had a turn, and its environment no state: it begins again once, when it can."""

    class Stateless:
        steps = 0

        async def reset(self, prompt):
            return Observation(())

        async def step(self, action):
            self.steps += 1
            if not gate.closings:
                await gate.close()
            return StepResult(({"role": "user", "content": "on"},), 1.0, done=self.steps == 2)

        async def close(self):
            pass

    task = make(Stateless)
    gate = task.front

    async def main(group):
        half = await task.run_group(group, 1, lambda s, a: 0)
        assert [len(s.turns) for s in half.samples] == [2]  # the second was cut off before its first token
        in_vain = await task.run_group(half, 1, lambda s, a: 0)
        assert in_vain.samples[0].metadata == {}
        gate.open()
        return await task.run_group(in_vain, 1, lambda s, a: 0)

    (sample,) = asyncio.run(main(group_of(1))).samples
    assert (sample.error, sample.reward, sample.metadata["restarted"]) == (None, 2.0, 1)


def test_who_waits_for_an_environment_is_interrupted_and_goes_on_like_others():
    """Places of open environments are given back by those that are parked, and taken again when they go on."""
    task = make(Counting, episodes=2)
    gate, group = task.front, group_of(8)

    async def main():
        running = asyncio.ensure_future(task.run_group(group, 1, lambda s, a: 0))
        await asyncio.sleep(0.004)
        await gate.close()
        half = await running
        pending = [s for s in half.samples if s.status is Status.PENDING]
        taken = task.environments.episodes.taken
        gate.open()
        return len(pending), taken, await task.run_group(half, 1, lambda s, a: 0)

    pending, taken, whole = asyncio.run(main())
    assert pending > 0
    assert taken == 0
    assert {s.reward for s in whole.samples} == {2.0}
    assert [len(s.turns) for s in whole.samples] == [2] * 8
    assert task.environment_metrics()["episodes_max"] == 2
