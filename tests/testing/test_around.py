"""Trackers, evaluators and presets that are wrong in one way each."""

import json
import time
from pathlib import Path

import pytest

from miles.api import ConfigError
from miles.builtins.trackers import JsonlTracker
from miles.evaluate import RolloutEvaluator
from miles.testing import EvaluatorContract, PresetContract, TrackerContract, installed


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
