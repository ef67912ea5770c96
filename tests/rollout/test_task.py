"""One task set: generation with retries, rewards of every shape, failures as data."""

import asyncio
import inspect
import re
from dataclasses import replace

import pytest

from miles.api import Component, hookimpl
from miles.config import Config, TaskSet
from miles.errors import HookError, WorkerError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.rollout.engines import EngineFront
from miles.rollout.measure import oldest_version
from miles.rollout.task import Task
from miles.types import (
    LOSS_MASK,
    WEIGHT_VERSION,
    Action,
    GenerateRequest,
    GenerateResult,
    Group,
    Observation,
    Prompt,
    Sample,
    Status,
    StepResult,
)


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
    generates = True
    accepts = frozenset()

    def __init__(self):
        self.requests: list[GenerateRequest] = []

    async def generate(self, request):
        self.requests.append(request)
        return GenerateResult([5, 9], [-1.0, -2.0], "stop", [3, 3], cached_tokens=1)


async def flaky(context, sample):
    """Fails on the first attempt of odd samples."""
    result = await context.generate(GenerateRequest(str(sample.id), sample.tokens, context.sampling, sample.seed))
    if sample.id % 2 and sample.seed < 1000:
        raise RuntimeError("no luck")
    sample.append(result.tokens)
    sample.status = Status.COMPLETED
    return sample


def length_reward(sample):
    return float(len(sample.tokens))


async def parts_reward(sample):
    if sample.id == 2:
        raise ValueError("cannot judge")
    return {"reward": 0.5, "format": 1.0}


class Rank:
    async def score_group(self, group):
        return [float(i) for i, _ in enumerate(group.samples)]


def make(task_set, terms=(), evaluation=False, **live):
    registry = Registry(load_plugins())
    for name, thing in live.items():
        kind, _, name = name.partition("__")
        registry.add(kind, name, thing)
    engine = Engine()
    config = Config(data={"reward_terms": terms})
    task = Task(task_set, config, registry, EngineFront([engine], 4), Chat(), evaluation=evaluation)
    return task, engine


def run(task, attempts=2, size=4):
    prompt = Prompt(id="s:0", task_set="s", text="x", tokens=[1, 2])
    samples = [Sample.begin(prompt, id=i, group_id=0, seed=i) for i in range(size)]
    return asyncio.run(task.run_group(Group(0, prompt, samples), attempts, lambda s, a: 1000 + s.id))


def test_rewards_are_weighted_and_their_parts_kept():
    task, _ = make(
        TaskSet(generate="flaky", reward={"length": 1.0, "parts": 2.0, "rank": 0.1}),
        generate_functions__flaky=flaky, rewards__length=length_reward, rewards__parts=parts_reward,
        rewards__rank=Rank(),
    )  # fmt: skip
    group = run(task)
    first, _, third, fourth = group.samples
    assert first.reward == pytest.approx(4 + 2 * 0.5 + 0.1 * 0)
    assert fourth.reward == pytest.approx(4 + 2 * 0.5 + 0.1 * 2)  # third of the three that were still good
    assert first.reward_parts == {"length": 4.0, "parts": 0.5, "parts/format": 1.0, "rank": 0.0}
    assert third.status is Status.FAILED
    assert re.fullmatch(rf"reward parts \({__file__}:\d+\): ValueError: cannot judge \({__file__}:\d+\)", third.error)


def test_a_failed_sample_is_tried_again_with_another_seed():
    task, engine = make(TaskSet(generate="flaky"), generate_functions__flaky=flaky)
    group = run(task)
    assert [s.status for s in group.samples] == [Status.COMPLETED] * 4
    assert [s.seed for s in group.samples] == [0, 1001, 2, 1003]
    assert len(engine.requests) == 6
    assert [len(s.metadata.get("retried", ())) for s in group.samples] == [0, 1, 0, 1]
    assert group.samples[1].metadata["retried"][0].startswith("RuntimeError: no luck (")


def test_when_attempts_run_out_the_failure_is_data():
    task, _ = make(TaskSet(generate="flaky"), generate_functions__flaky=flaky)
    group = run(task, attempts=1)
    assert [s.status.value for s in group.samples] == ["completed", "failed"] * 2
    assert group.samples[1].error.startswith("RuntimeError: no luck (")
    assert group.samples[1].reward is None


def test_stop_tokens_of_the_chat_format_are_added():
    task, engine = make(
        TaskSet(generate="flaky", sampling={"stop_token_ids": [7], "max_new_tokens": 5}),
        generate_functions__flaky=flaky,
    )
    run(task)
    assert engine.requests[0].sampling.stop_token_ids == (7, 9)
    assert engine.requests[0].sampling.max_new_tokens == 5


def test_components_may_come_from_a_plugin_given_in_python():
    class Plugin:
        @hookimpl
        def miles_register_rewards(self):
            return {"mine": Component("builtins:len")}

    registry = Registry(load_plugins(extra=[Plugin()]))
    assert "mine" in registry.names("rewards")


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (None, "None"),
        ("0.5", "'0.5'"),
        ({"a": 1}, "{'a': 1}"),
        ({"reward": 1.0, "a": None}, "{'reward': 1.0, 'a': None}"),
        (float("nan"), "nan"),
        ({"reward": float("-inf"), "a": 1}, "{'reward': -inf, 'a': 1}"),
    ],
)
def test_what_is_no_score_is_said_with_the_place_of_the_reward(score, shown):
    def odd(sample):
        return score

    task, _ = make(TaskSet(generate="flaky", reward="odd"), generate_functions__flaky=flaky, rewards__odd=odd)
    expected = (
        f"reward odd ({__file__}:{inspect.getsourcelines(odd)[1]}): it returned {shown}; a finite number is expected, "
        "or a mapping of names to numbers with a finite 'reward'"
    )
    assert [(s.error, s.reward, s.status) for s in run(task).samples] == [(expected, None, Status.FAILED)] * 4


def test_scores_that_are_not_one_a_sample_are_said():
    class Short:
        async def score_group(self, group):
            return [1.0]

    task, _ = make(TaskSet(generate="flaky", reward="short"), generate_functions__flaky=flaky, rewards__short=Short())
    place = f"{__file__}:{inspect.getsourcelines(Short)[1]}"
    for sample in run(task).samples:
        assert sample.error == f"reward short ({place}): ValueError: it returned 1 scores for 4 samples"


def lost(sample):
    if sample.id == 2:
        raise WorkerError("rollout rank 1 died in score")
    return 1.0


async def lost_awaited(sample):
    return lost(sample)


class LostTogether:
    async def score_group(self, group):
        raise WorkerError("rollout rank 1 died in score")


@pytest.mark.parametrize("reward", [lost, lost_awaited, LostTogether])
def test_an_engine_that_a_reward_finds_lost_is_no_failed_sample(reward):
    async def done(context, sample):
        sample.append([7])
        sample.status = Status.COMPLETED
        return sample

    task, _ = make(TaskSet(generate="done", reward="lost"), generate_functions__done=done, rewards__lost=reward)
    with pytest.raises(WorkerError, match="^rollout rank 1 died in score$"):
        run(task)


def test_an_environment_that_is_none_ends_it_before_anything_is_generated():
    class Endless:
        async def reset(self, prompt): ...
        async def step(self, action): ...

    task, engine = make(TaskSet(environment="endless"), environments__endless=Endless)
    with pytest.raises(HookError) as caught:
        run(task)
    place = f"{__file__}:{inspect.getsourcelines(Endless)[1]}"
    assert str(caught.value) == (
        f"environment 'endless' ({place}) is not a miles.protocols.Environment: method `close` is missing"
    )
    assert engine.requests == []


# ------------------------------------------------------------------------------------------------------ greedy baseline


def run_with_baseline(task, attempts=2, size=2):
    prompt = Prompt(id="s:0", task_set="s", text="x", tokens=[1, 2])
    samples = [Sample.begin(prompt, id=i, group_id=0, seed=i) for i in (*range(size), -1)]
    group = Group(0, prompt, samples[:size], baseline=samples[size])
    return asyncio.run(task.run_group(group, attempts, lambda s, a: 2000 + s.id))


def test_the_baseline_is_generated_greedily_judged_alone_and_not_trained():
    seen = []

    class Ranked(Rank):
        async def score_group(self, group):
            seen.append([s.id for s in group.samples])
            return await super().score_group(group)

    task, engine = make(
        TaskSet(generate="flaky", reward={"length": 1.0, "ranked": 10.0}, sampling={"temperature": 0.7}),
        generate_functions__flaky=flaky, rewards__length=length_reward, rewards__ranked=Ranked(),
    )  # fmt: skip
    group = run_with_baseline(task)
    temperatures = {request.id: request.sampling.temperature for request in engine.requests}
    assert temperatures == {"0": 0.7, "1": 0.7, "-1": 0.0}
    assert sorted(seen) == [[-1], [0, 1]]
    assert [s.reward for s in group.samples] == [4.0, 14.0]
    assert group.baseline_reward == group.baseline.reward == 4.0
    assert group.baseline.tokens == [1, 2, 5, 9]
    assert group.baseline.trainable_tokens == 0
    assert group.baseline.seed == 1999  # it failed once, as odd ones do, and was tried again
    assert [s.id for s in group.rollouts] == [-1, 0, 1]


def test_a_baseline_that_failed_has_no_reward():
    task, _ = make(TaskSet(generate="flaky", reward="length"), generate_functions__flaky=flaky,
                   rewards__length=length_reward)  # fmt: skip
    group = run_with_baseline(task, attempts=1)
    assert (group.baseline.status, group.baseline_reward) == (Status.FAILED, None)
    assert group.samples[0].reward == 4.0


def test_a_baseline_lives_in_the_environment_of_its_set():
    class Echo:
        def __init__(self):
            self.turns = 0

        async def reset(self, prompt):
            return Observation(())

        async def step(self, action):
            self.turns += 1
            return StepResult(({"role": "user", "content": "more"},), reward=0.5, done=self.turns == 2)

        async def close(self): ...

    task, engine = make(TaskSet(environment="echo", reward="environment"), environments__echo=Echo)
    group = run_with_baseline(task)
    assert [r.sampling.temperature for r in engine.requests].count(0.0) == 2
    assert len(group.baseline.turns) == 2
    assert group.baseline_reward == 1.0


# --------------------------------------------------------------------------------------------------------- reward terms


def test_terms_are_added_to_the_rewards_of_a_training_set():
    task, _ = make(
        TaskSet(generate="flaky", reward="length"), {"rank": -0.5}, generate_functions__flaky=flaky,
        rewards__length=length_reward, rewards__rank=Rank(),
    )  # fmt: skip
    group = run_with_baseline(task)
    assert [s.reward for s in group.samples] == [4.0, 3.5]
    assert [s.task_reward for s in group.samples] == [4.0, 4.0]
    assert (group.rewards_G, group.task_rewards_G) == ([4.0, 3.5], [4.0, 4.0])
    assert group.samples[1].reward_parts == {"length": 4.0, "rank": 1.0}
    assert group.baseline_reward == 4.0


def test_evaluation_has_no_terms():
    task, _ = make(
        TaskSet(generate="flaky", reward="length"), {"rank": -0.5}, True, generate_functions__flaky=flaky,
        rewards__length=length_reward, rewards__rank=Rank(),
    )  # fmt: skip
    assert [(s.reward, s.task_reward, s.reward_parts) for s in run(task, size=2).samples] == [
        (4.0, 4.0, {"length": 4.0})
    ] * 2


def test_terms_alone_are_no_reward():
    task, _ = make(TaskSet(generate="flaky"), "rank", generate_functions__flaky=flaky, rewards__rank=Rank())
    assert [(s.reward, s.reward_parts) for s in run(task, size=2).samples] == [(None, {})] * 2


def test_a_term_that_fails_takes_the_reward_with_it():
    task, _ = make(
        TaskSet(generate="flaky", reward="length"), "parts", generate_functions__flaky=flaky,
        rewards__length=length_reward, rewards__parts=parts_reward,
    )  # fmt: skip
    good, _, bad, _ = run(task).samples
    assert (good.reward, good.task_reward) == (4.5, 4.0)
    assert (bad.status, bad.reward, bad.task_reward) == (Status.FAILED, None, None)


def test_rewards_are_told_how_long_a_turn_may_be():
    task, _ = make(TaskSet(generate="flaky", sampling={"max_new_tokens": 33}), generate_functions__flaky=flaky)
    assert [s.max_new_tokens for s in run_with_baseline(task).rollouts] == [33, 33, 33]


def test_a_client_that_was_cancelled_within_fails_its_sample():
    async def gone(context, sample):
        raise asyncio.CancelledError("a scope of somebody's client")

    task, _ = make(TaskSet(generate="gone"), generate_functions__gone=gone)
    assert {(s.status, s.error.split(" (")[0]) for s in run(task).samples} == {
        (Status.FAILED, "CancelledError: a scope of somebody's client")
    }


def test_siblings_that_are_aborted_for_good_are_not_begun_again_without_end():
    async def cut(context, sample):
        sample.append([7])
        sample.status = Status.ABORTED
        return [sample, sample.beginning(2)]

    task, _ = make(TaskSet(generate="cut"), generate_functions__cut=cut)
    group = run(task, size=1)
    assert [s.status for s in group.samples] == [Status.ABORTED] * 2
    assert group.samples[0].metadata["retried"] == ["aborted"]


def test_one_that_comes_back_after_the_gate_is_open_again_was_interrupted_all_the_same():
    async def tidy(context, sample):
        gate.closings += 1  # closed and opened while it put its things away
        sample.append([7])
        sample.status = Status.ABORTED
        return sample

    task, _ = make(TaskSet(generate="tidy"), generate_functions__tidy=tidy)
    gate = task.front
    (sample,) = run(task, size=1).samples
    assert (sample.status, sample.tokens) == (Status.PENDING, [1, 2, 7])


def test_a_group_under_way_holds_the_attempt_that_is_made_and_not_the_one_that_failed():
    seen = []

    async def once_more(context, sample):
        seen.append([(one.id, one.seed, list(one.tokens), one is sample) for one in group.rollouts])
        sample.append([7], {WEIGHT_VERSION: len(seen)})
        if sample.seed < 1000:
            raise RuntimeError("no luck")
        sample.status = Status.COMPLETED
        return sample

    task, _ = make(TaskSet(generate="once_more"), generate_functions__once_more=once_more)
    prompt = Prompt(id="s:0", task_set="s", text="x", tokens=[1, 2])
    first, baseline = (Sample.begin(prompt, id=i, group_id=0, seed=i) for i in (0, 1))
    group = Group(0, prompt, [first], baseline)
    asyncio.run(task.run_group(group, 2, lambda s, a: 1000 + s.id))
    assert (0, 1000, [1, 2], True) in seen[1]
    assert (1, 1001, [1, 2], True) in seen[3]
    assert oldest_version(group.rollouts) == 2  # of the first attempt that was not given up


def test_siblings_have_ids_of_their_own():
    async def twins(context, sample):
        sample = await context_free(sample)
        return [sample, replace(sample), replace(sample, id=77), replace(sample)]

    async def context_free(sample):
        sample.append([5], {LOSS_MASK: 1})
        sample.status = Status.COMPLETED
        return sample

    task, _ = make(TaskSet(generate="twins"), generate_functions__twins=twins)
    group = run(task, size=1)
    assert [s.id for s in group.samples] == [0, 1 << 40, 77, 3 << 40]
    assert {s.rollout_id for s in group.samples} == {0}
