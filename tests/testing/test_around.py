"""Executors, trackers, evaluators and presets that are wrong in one way each."""

import asyncio
import json
import time
from functools import partial
from pathlib import Path

import pytest

from miles.api import ConfigError, ExecutorContext, Seats, WorkerError
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.local import LocalExecutor
from miles.builtins.trackers import JsonlTracker
from miles.evaluate import RolloutEvaluator
from miles.testing import EvaluatorContract, ExecutorContract, PresetContract, TrackerContract, installed
from miles.toolkit import DirectLink, Failure, ProcessLink, WorkerFailure, WorkerHost, Workers
from miles.workers import process

CONTEXT = ExecutorContext({f"workers-{size}": Seats(size) for size in (1, 2)})


class Hosts:
    """Any number of ranks, all in this process."""

    shares_process = True
    group, host = Workers, WorkerHost

    async def launch(self, name, target, *args, **kwargs):
        size = int(name.rpartition("-")[2])  # the contract names its groups so
        links = [DirectLink(self.host(rank, size)) for rank in range(size)]
        return await Workers.build(self.group(name, links, address="127.0.0.1", timeout=None), target, args, kwargs)

    async def close(self):
        pass


def executor_with(executor=None, host=None, **group):
    """`Hosts` with other methods: of its own, of its hosts, of its groups."""
    parts = {"host": type("WrongHost", (WorkerHost,), host or {}), "group": type("WrongGroup", (Workers,), group)}
    return type("WrongExecutor", (Hosts,), {**parts, **(executor or {})})


def local_with(**methods):
    """The members of a contract whose executor is `local` with other methods."""
    wrong = type("WrongLocal", (LocalExecutor,), methods)
    return None, {"build": lambda self: wrong(context=self.context()), "sizes": (1,), "patience": 1.5}


def test_right_executors_pass(passes):
    passes(ExecutorContract, Hosts)
    passes(ExecutorContract, partial(InProcessExecutor, context=CONTEXT), sizes=(1,))


def test_wrong_executors_are_caught(catches, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 0.2)

    async def backwards(self, *args, **kwargs):
        return (await Workers.call(self, *args, **kwargs))[::-1]

    async def the_same_for_all(self, method, args):
        return await Workers.call(self, method, *args[0])

    async def everybody(self, rank, *args, **kwargs):
        return (await self.call(*args, **kwargs))[rank]

    async def the_first(self, rank, *args, **kwargs):
        return await Workers.call_one(self, 0, *args, **kwargs)

    async def by_json(self, *args, **kwargs):
        return [str(value) for value in await Workers.call(self, *args, **kwargs)]

    async def at_once(self, key, method, args, kwargs):
        found = await asyncio.to_thread(getattr(self.objects[key], method), *args, **kwargs)
        return await found if asyncio.iscoroutine(found) else found

    async def blocking(self, key, method, args, kwargs):
        found = getattr(self.objects[key], method)(*args, **kwargs)
        return await found if asyncio.iscoroutine(found) else found

    async def one_by_one(self, key, method, args, kwargs):
        async with self.__dict__.setdefault("turn", asyncio.Lock()):
            return await WorkerHost.call(self, key, method, args, kwargs)

    async def coroutines_in_turn(self, key, method, args, kwargs):
        if asyncio.iscoroutinefunction(getattr(self.objects[key], method)):
            return await one_by_one(self, key, method, args, kwargs)
        return await WorkerHost.call(self, key, method, args, kwargs)

    async def touchy(self, *args, **kwargs):
        if getattr(self, "spoilt", False):
            raise WorkerError("the answer is somebody else's")
        try:
            return await Workers.call(self, *args, **kwargs)
        except asyncio.CancelledError:
            self.spoilt = True
            raise

    async def the_same_object(self, name, target, *args, **kwargs):
        return self

    async def in_its_place(self, name, target, *args, **kwargs):
        return await Workers.build(self, target, args, kwargs)

    async def silent(self, *args, **kwargs):
        try:
            return await Workers.call(self, *args, **kwargs)
        except ZeroDivisionError:
            return [None] * self.size

    async def terse(self, *args, **kwargs):
        try:
            return await Workers.call(self, *args, **kwargs)
        except Exception:
            raise WorkerError("a worker failed") from None

    async def fragile(self, *args, **kwargs):
        self.fate = getattr(self, "fate", None)
        if self.fate:
            raise self.fate
        try:
            return await Workers.call(self, *args, **kwargs)
        except Exception as error:
            self.fate = error
            raise

    async def lazily(self, name, target, *args, **kwargs):
        try:
            return await Hosts.launch(self, name, target, *args, **kwargs)
        except ValueError:
            return Workers(name, [], address="", timeout=None)

    async def once(self):
        del self.links

    async def copying(self, *args, **kwargs):
        return [type(value)() for value in await Workers.call(self, *args, **kwargs)]

    async def unburied(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        for link in group.links:
            link._bury = asyncio.Event().wait
        return group

    async def forgetful(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        group._first_cause = lambda method, errors, silent: WorkerError("rank 0 died")
        for link in group.links:
            link.request = unless_dead(link)
        return group

    def unless_dead(link):
        async def request(*args):
            try:
                return await ProcessLink.request(link, *args)
            except WorkerFailure:
                if "die" in args:
                    raise

        return request

    async def patient(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        group.timeout = None
        return group

    async def curt(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        group._whereabouts = lambda rank, why: asyncio.sleep(0, Failure(rank, "silent", why))
        return group

    async def merciful(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        for link in group.links:
            link.kill = lambda: None
        return group

    async def unclosed(self, *args, **kwargs):
        group = await LocalExecutor.launch(self, *args, **kwargs)
        group.close = partial(asyncio.sleep, 0)
        return group

    catches(
        ExecutorContract,
        {
            "test_every_rank_answers_in_order": [executor_with(call=backwards)],
            "test_each_rank_gets_its_own_arguments": [executor_with(call_each=the_same_for_all)],
            "test_one_rank_is_called_alone": [executor_with(call_one=everybody), executor_with(call_one=the_first)],
            "test_arrays_and_nested_data_cross_unchanged": [executor_with(call=by_json)],
            "test_calls_to_a_rank_follow_one_another": [executor_with(host={"call": at_once})],
            "test_coroutine_methods_run_beside_all_others": [
                (executor_with(host={"call": one_by_one}), {"patience": 1.0}),
                (executor_with(host={"call": coroutines_in_turn}), {"patience": 1.0}),
            ],
            "test_the_event_loop_is_not_blocked": [executor_with(host={"call": blocking})],
            "test_a_call_that_is_given_up_leaves_the_group_as_it_is": [executor_with(call=touchy)],
            "test_another_object_lives_beside": [
                executor_with(beside=the_same_object),
                executor_with(beside=in_its_place),
            ],
            "test_workers_reach_the_driver": [
                executor_with(
                    __init__=lambda self, *args, **kwargs: Workers.__init__(self, *args, **{**kwargs, "address": "::1"})
                )
            ],
            "test_ranks_find_each_other": [executor_with({"shares_process": False})],
            "test_it_says_whether_it_shares_the_process": [executor_with(call=copying)],
            "test_a_failure_says_what_and_where": [
                executor_with(call=silent),
                executor_with(call=terse),
                executor_with(call=fragile),
            ],
            "test_a_worker_that_cannot_be_built_is_an_error": [executor_with({"launch": lazily})],
            "test_a_size_it_does_not_serve_is_refused": [(Hosts, {"sizes": (1,)})],
            "test_a_worker_that_dies_is_an_error": [local_with(launch=unburied), local_with(launch=forgetful)],
            "test_a_worker_that_hangs_is_an_error": [
                local_with(launch=patient),
                local_with(launch=curt),
                local_with(launch=merciful),
            ],
            "test_closing": [executor_with(close=once), local_with(launch=unclosed)],
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
