"""examples/openreward: its games, its pupil, its script, and a run of it that is cut short."""

import asyncio
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import miles

EXAMPLE = Path(__file__).parents[2] / "examples" / "openreward"
NUMBERS = re.compile(r"\d+")


@pytest.fixture(scope="module")
def example():
    """Its modules, as they find each other."""
    names = ("games", "pupil", "measure")
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


def test_the_pupil_knows_the_tools_and_plays_badly(example):
    pupil = example["pupil"]
    games = [row["input"] for row in asyncio.run(pupil.demonstrations(EXAMPLE / "train_config.yaml", seed=3))]
    assert len(games) == pupil.GAMES
    assert all(game[0]["role"] == "system" and game[-1]["role"] == "assistant" for game in games)
    coins = [game for game in games if "coin" in game[1]["content"]]
    assert len(coins) == len(games) / 2
    read = [game for game in coins if len(game) == 5]
    assert 0.37 < len(read) / len(coins) < 0.43
    for _, _, _, note, opened in read:
        assert opened["tool_calls"][0]["function"]["arguments"]["box"] == int(NUMBERS.findall(note["content"])[0])
    guessed = [game for game in games if "coin" not in game[1]["content"]]
    assert {len(game) for game in guessed} == {3, 5}
    assert asyncio.run(pupil.demonstrations(EXAMPLE / "train_config.yaml", seed=3))[7]["input"] == games[7]


def test_who_begins_in_the_middle_always_wins(example):
    for task in example["games"].HigherLower.list_tasks("train"):
        low, high = task["lowest"], task["lowest"] + example["games"].WIDTH - 1
        for _ in range(2):
            guess = (low + high) // 2
            low, high = (guess + 1, high) if task["number"] > guess else (low, guess - 1)
            if guess == task["number"]:
                break
        assert guess == task["number"]


def test_no_box_of_the_test_is_trained_on(example):
    splits = [{task["box"] for task in example["games"].Coin.list_tasks(split)} for split in ("train", "test")]
    assert len(splits[0]) + len(splits[1]) == 90
    assert not splits[0] & splits[1]


def test_what_is_measured(capsys, monkeypatch, example):
    monkeypatch.setattr(sys, "argv", ["measure.py", "--episodes", "8"])
    monkeypatch.setattr(example["measure"], "AT_ONCE", (1, 4))
    example["measure"].main()
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def games(example):
    """Where the games are served: in a process of their own, for the SDK's server works once in each."""
    with example["measure"].served() as url:
        yield url


@pytest.mark.slow
def test_a_model_learns_to_read_the_note(example, games, tmp_path, monkeypatch):
    """The recipe with three boxes, from a pupil who reads the note four times out of ten."""
    from miles_openreward import prepare_tasks

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((EXAMPLE / "train_config.yaml").read_text())
    coin = config["environments"].pop("Coin") | {"base_url": games, "num_samples": 3, "eval_splits": ["train"]}
    config["environments"] = {"Coin": coin}
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(config))
    assert prepare_tasks.main([]) == 0

    pupil, rng = example["pupil"], random.Random(1)
    tasks = [json.loads(line)["metadata"]["task_spec"] for line in (tmp_path / "tasks/Coin.jsonl").open()]
    shown = [
        {"input": asyncio.run(pupil.play(example["games"].Coin, task, config["system_prompt_template"], 3, rng))}
        for task in tasks * 50
    ]
    monkeypatch.setattr(pupil, "demonstrations", lambda *_: asyncio.sleep(0, shown))
    pupil.make(tmp_path / "train_config.yaml", tmp_path / "pupil", seed=1)

    changed = {"report": False, "num_threads": 1}
    short = {"num_rollout": 25, "rollout_batch_size": 256, "lr_warmup_iters": 10}
    miles.train(EXAMPLE / "sft.yaml", **short, **changed)
    files = [EXAMPLE / "grpo.yaml", EXAMPLE / "tiny.yaml", tmp_path / "tasks/tasks.yaml"]
    turn = {f"{section}.sets.*.sampling.max_new_tokens": 32 for section in ("data", "eval")}
    steps = {"num_rollout": 10, "rollout_batch_size": 6, "eval_interval": 10}
    run = miles.train(files, **turn, **steps, **changed)

    metrics = [json.loads(line) for line in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["rollout/reward"] < metrics[10]["rollout/reward"]
    accuracy = run.summary["evaluation"]["Coin_train"]
    assert accuracy["first"]["accuracy"] < accuracy["last"]["accuracy"] == 1
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-5 for step in metrics[1:])
    assert all(step["rollout/failed_ratio"] == 0 for step in metrics[1:])


@pytest.fixture
def given_commands(tmp_path):
    """Run a copy of run.sh with a `miles` and a `python` that only write down their words."""
    here = tmp_path / "examples" / "openreward"
    here.mkdir(parents=True)
    (here / "run.sh").write_bytes((EXAMPLE / "run.sh").read_bytes())
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    for name in ("miles", "python"):
        (programs / name).write_text(
            f'#!/bin/sh\nmkdir -p tasks; echo "$EVAL" > tasks/tasks.yaml\necho {name} "$@" >> {log}\n'
        )
        (programs / name).chmod(0o755)

    def call(*words, eval=""):
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "EVAL": eval}
        done = subprocess.run(["bash", here / "run.sh", *words], capture_output=True, text=True, env=environment)
        return done, log.read_text().replace(str(here), "HERE").splitlines() if log.exists() else []

    return call


def test_flags_of_the_script_are_those_of_miles(given_commands, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    words = (
        "--config hosted.yaml --model Qwen/Qwen3-0.6B --lr 1e-5 --n-samples 4 --rollout-batch-size 8 --temperature 0.7 "
        "--max-response-len 99 --max-tokens-per-gpu 4096 --train-backend fsdp --actor-gpus 2 --rollout-gpus 4 --tp 2 "
        f"--load {tmp_path}/checkpoint -- --num-rollout 3 --preset dapo"
    )
    done, (prepared, trained) = given_commands(*words.split(), eval="eval: {}")
    assert done.returncode == 0, done.stderr
    assert prepared == "python -m miles_openreward.prepare_tasks --config hosted.yaml --output tasks"
    assert trained == (
        "miles train HERE/grpo.yaml tasks/tasks.yaml --data.sets.*.sampling.max_new_tokens=99 "
        "--data.sets.*.sampling.temperature=0.7 --hf-checkpoint Qwen/Qwen3-0.6B --lr 1e-5 --n-samples-per-prompt 4 "
        "--rollout-batch-size 8 --max-tokens-per-gpu 4096 --train-backend fsdp --actor-num-gpus-per-node 2 "
        f"--rollout-num-gpus 4 --rollout-num-gpus-per-engine 2 --load {tmp_path}/checkpoint "
        "--eval.sets.*.sampling.max_new_tokens=99 --num-rollout 3 --preset dapo"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr"], "--lr needs a value"),
        (["--lrr", "1"], "--lrr is no flag of this script"),
        (["--config", "hosted.yaml"], "--config needs --model"),
    ],
)
def test_what_the_script_refuses(given_commands, words, said):
    done, commands = given_commands(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert commands == []
