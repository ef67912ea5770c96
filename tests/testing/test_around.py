"""Executors, trackers, evaluators and presets that are wrong in one way each."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from miles.api import ConfigError, ExecutorContext, Seats, WorkerError, import_target
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.trackers import JsonlTracker
from miles.evaluate import RolloutEvaluator
from miles.testing import EvaluatorContract, ExecutorContract, PresetContract, TrackerContract, installed

CONTEXT = ExecutorContext({f"workers-{size}": Seats(size) for size in (1, 2)})


class Threads:
    """Workers as threads of this process, one a rank."""

    shares_process = True

    async def launch(self, name, target, *args, **kwargs):
        size = int(name.rpartition("-")[2])  # the contract names its groups so
        return Group([import_target(target)(rank, size, *args, **kwargs) for rank in range(size)])

    async def close(self):
        pass


class Group:
    def __init__(self, workers):
        self.workers, self.size = workers, len(workers)
        self.threads = [ThreadPoolExecutor(1) for _ in workers]

    async def call(self, method, *args, **kwargs):
        return await self.run(method, [args] * self.size, kwargs)

    async def call_each(self, method, args):
        return await self.run(method, args, {})

    async def run(self, method, args, kwargs):
        loop = asyncio.get_running_loop()
        functions = [getattr(worker, method) for worker in self.workers]
        calls = [
            loop.run_in_executor(thread, lambda f=function, a=given: f(*a, **kwargs))
            for thread, function, given in zip(self.threads, functions, args, strict=True)
        ]
        return await asyncio.gather(*calls)

    async def close(self):
        for thread in self.threads:
            thread.shutdown()


def executor_with(executor=None, **methods):
    """`Threads` whose groups have these methods."""

    class Wrong(Threads):
        async def launch(self, name, target, *args, **kwargs):
            group = await super().launch(name, target, *args, **kwargs)
            group.__class__ = type("WrongGroup", (Group,), methods)
            return group

    return type("WrongExecutor", (Wrong,), executor or {})


def test_right_executors_pass(passes):
    passes(ExecutorContract, Threads)
    passes(ExecutorContract, partial(InProcessExecutor, context=CONTEXT), sizes=(1,))


def test_wrong_executors_are_caught(catches):
    async def backwards(self, method, args, kwargs):
        return (await Group.run(self, method, args, kwargs))[::-1]

    async def the_same_for_all(self, method, args):
        return await Group.run(self, method, [args[0]] * self.size, {})

    async def blocking(self, method, args, kwargs):
        return [getattr(w, method)(*a, **kwargs) for w, a in zip(self.workers, args, strict=True)]

    async def at_once(self, method, args, kwargs):
        calls = zip(self.workers, args, strict=True)
        return await asyncio.gather(*(asyncio.to_thread(getattr(w, method), *a, **kwargs) for w, a in calls))

    async def silent(self, method, args, kwargs):
        outcomes = await asyncio.gather(Group.run(self, method, args, kwargs), return_exceptions=True)
        return [None] * self.size if isinstance(outcomes[0], Exception) else outcomes[0]

    async def terse(self, method, args, kwargs):
        try:
            return await Group.run(self, method, args, kwargs)
        except Exception:
            raise WorkerError("a worker failed") from None

    async def by_json(self, method, args, kwargs):
        return [str(value) for value in await Group.run(self, method, args, kwargs)]

    async def lazily(self, name, target, *args, **kwargs):
        try:
            return await Threads.launch(self, name, target, *args, **kwargs)
        except ValueError:
            return Group([])

    async def once(self):
        del self.threads

    async def copying(self, method, args, kwargs):
        return [type(value)() for value in await Group.run(self, method, args, kwargs)]

    catches(
        ExecutorContract,
        {
            "test_every_rank_answers_in_order": [executor_with(run=backwards)],
            "test_each_rank_gets_its_own_arguments": [executor_with(call_each=the_same_for_all)],
            "test_arrays_and_nested_data_cross_unchanged": [executor_with(run=by_json)],
            "test_calls_to_a_rank_follow_one_another": [executor_with(run=at_once)],
            "test_the_event_loop_is_not_blocked": [executor_with(run=blocking)],
            "test_a_failure_says_what_and_where": [executor_with(run=silent), executor_with(run=terse)],
            "test_a_worker_that_cannot_be_built_is_an_error": [executor_with({"launch": lazily})],
            "test_a_size_it_does_not_serve_is_refused": [(Threads, {"sizes": (1,)})],
            "test_closing": [executor_with(close=once)],
            "test_it_says_whether_it_shares_the_process": [executor_with(run=copying)],
        },
    )


# ----------------------------------------------------------------------------------------------------------- trackers


def read_back(self, folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row.pop("step"): row for row in rows}


def tracker(**methods):
    return type("Wrong", (JsonlTracker,), methods)


def test_wrong_trackers_are_caught(catches):
    def one_step_late(self, step, metrics):
        JsonlTracker.log(self, step + 1, metrics)

    def completed_only(self, status):
        {"completed": 0}[status]
        JsonlTracker.finish(self, status)

    def strict(self, step, metrics):
        json.dumps(metrics, allow_nan=False)
        JsonlTracker.log(self, step, metrics)

    def appending(self, run):
        run.directory.mkdir(parents=True, exist_ok=True)
        self._file = (run.directory / "metrics.jsonl").open("a", buffering=1)

    first = []

    def in_the_first_place(self, run):
        first.append(run.directory)
        JsonlTracker.start(self, type(run)(run.name, first[0], run.config))

    def popping(self, step, metrics):
        JsonlTracker.log(self, step, dict(metrics))
        metrics.clear()

    def careless(self, run):
        try:
            JsonlTracker.start(self, run)
        except OSError:
            self._file = (Path(run.directory).parent.parent / "elsewhere.jsonl").open("a")

    catches(
        TrackerContract,
        {
            "test_a_run_is_tracked": [tracker(log=one_step_late), tracker(log=lambda self, step, metrics: None)],
            "test_every_end_is_taken": [tracker(finish=completed_only)],
            "test_numbers_of_every_sort": [tracker(log=strict)],
            "test_a_resumed_run_goes_on": [tracker(start=appending)],
            "test_two_runs_in_one_process": [tracker(start=in_the_first_place)],
            "test_metrics_are_left_alone": [tracker(log=popping)],
            "test_what_cannot_be_written_is_an_error": [tracker(start=careless)],
        },
        logged=read_back,
    )


# --------------------------------------------------------------------------------------------- evaluators and presets


def evaluator(change):
    async def evaluate(self, run, step):
        return change(await RolloutEvaluator.evaluate(self, run, step))

    return type("Wrong", (RolloutEvaluator,), {"evaluate": evaluate})


def test_wrong_evaluators_are_caught(catches):
    class Forgiving(RolloutEvaluator):
        async def evaluate(self, run, step):
            try:
                return await super().evaluate(run, step)
            except Exception:
                return {"half": {"reward": 0.0}, "all": {"reward": 0.0}}

    catches(
        EvaluatorContract,
        {
            "test_every_set_has_its_metrics": [
                evaluator(lambda found: {"half": found["half"]}),
                evaluator(lambda found: {**found, "all": {"reward": float("nan")}}),
            ],
            "test_the_reward_is_that_of_the_answers": [
                evaluator(lambda found: {name: {**m, "reward": 1 - m["reward"]} for name, m in found.items()}),
            ],
            "test_the_same_policy_gets_the_same_numbers": [
                evaluator(lambda found: {**found, "all": {**found["all"], "time": time.perf_counter()}}),
            ],
            "test_an_engine_that_is_gone_is_not_a_bad_policy": [Forgiving],
        },
    )


@pytest.mark.parametrize(
    ("overlay", "test"),
    [
        ({}, "test_it_sets_something"),
        ({"algorithm": {"advantage_estimater": "grpo"}}, "test_it_is_a_valid_configuration"),
        ({"optimizer": {"lr": "fast"}}, "test_it_is_a_valid_configuration"),
        ({"algorithm": {"policy_loss": "no_such_loss"}}, "test_its_components_are_there"),
        ({"algorithm": {"policy_loss": {"name": "ppo_clip", "epsilon": 0.2}}}, "test_its_components_are_there"),
        ({"model": {"hf_checkpoint": "/home/me/model"}}, "test_it_leaves_alone_what_is_the_users"),
        ({"run": {"dir": "runs/mine"}}, "test_it_leaves_alone_what_is_the_users"),
        ({"optimizer": {"lr": 1.0}}, "test_it_is_the_same_each_time"),
    ],
)
def test_wrong_presets_are_caught(overlay, test):
    contract = type("TestWrong", (PresetContract,), {"name": "sft", "overlay": overlay})()
    with pytest.raises((AssertionError, ConfigError, ValueError, LookupError)):
        getattr(contract, test)()
    assert installed().preset("sft")
