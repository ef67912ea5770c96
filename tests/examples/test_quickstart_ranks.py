"""Sixty steps of the quickstart on 2 and 4 ranks, of either executor, end at the bits of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles.report.compare import compare

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


def python(folder, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def learn(folder, run, *flags):
    """The recipe's reinforcement learning, with few evaluations; micro-batches are planned for four ranks."""
    said = python(
        folder, "-m", "miles", "train", EXAMPLE / "grpo.yaml", "--run-dir", run, "--reproducible-ranks", "4",
        "--num-threads", "1", "--dump-samples", "512", "--save-interval", "60", "--eval-interval", "60", "--no-report",
        "--eval.sets.heldout.path=data/heldout.jsonl@[0:200]",
        "--eval.sets.heldout_sampled.path=data/heldout.jsonl@[0:50]", *flags,
    )  # fmt: skip
    return folder / run, said


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A folder with the recipe's data and two fifths of its warm-up: without so much no answer is right, and nothing
    would be learned afterwards."""
    folder = tmp_path_factory.mktemp("quickstart")
    python(folder, EXAMPLE / "prepare.py", "--out", "data", "--seed", "1")
    python(folder, "-m", "miles", "train", EXAMPLE / "sft.yaml", "--num-rollout", "40", "--no-report")
    return folder


@pytest.fixture(scope="module")
def alone(warm):
    """The run of one process, which learns."""
    run = learn(warm, "alone")[0]
    rewards = [json.loads(line).get("rollout/reward", 0.0) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == 61
    assert sum(rewards[-10:]) / 10 > sum(rewards[1:11]) / 10 + 0.2
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "ranks"), [("local", 2), ("local", 4), ("ray", 2), ("ray", 4)])
def test_a_run_on_several_ranks_is_that_of_one(warm, alone, executor, ranks):
    """Under Ray, too, where engines form other batches each time."""
    run, said = learn(warm, f"{executor}-{ranks}", "--executor", executor, "--actor-num-gpus-per-node", str(ranks))
    found = compare(alone, run)
    assert (found.steps, found.first_token) == (61, None), str(found.first_token) + said
    assert found.tokens > 300_000
    assert found.within(1e-5), found.metrics
    assert found.weights == 0, found.weights_name
