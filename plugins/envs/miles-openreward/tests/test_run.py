"""Whole runs, with a tiny model that says anything."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

import miles
from miles.testing import tiny

SECRET = "open-sesame-17"


@pytest.fixture
def config(tmp_path, url, worlds, monkeypatch, nobody_left):
    """Of a run on the first tasks of an environment."""
    monkeypatch.setenv("FLOOR_KEY", SECRET)

    def make(world, tasks=3):
        path = tmp_path / f"{world}.jsonl"
        rows = ({"prompt": f"{world} {goal}", "metadata": worlds.row(world, goal)} for goal in range(1, tasks + 1))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = tiny.checkpoint(tmp_path / "model", tiny.hf_config("qwen3", max_position_embeddings=2048))
        environment = {"name": "openreward", "base_url": url, "secrets": ["floor_key"]}
        task_set = {
            "name": world,
            "path": str(path),
            "keys": {"input": "prompt"},
            "environment": environment,
            "reward": {"name": "openreward", "nonterminal_reward": -1.0},
            "sampling": {"max_new_tokens": 8},
            "max_turns": 2,
        }
        return {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"hf_checkpoint": str(model)},
            "data": {"sets": [task_set], "chat_format": "template"},
            "rollout": {"num_rollout": 2, "batch_size": tasks, "n_samples_per_prompt": 2, "max_context_len": 1500},
            "algorithm": {"advantage_estimator": "grpo"},
        }

    return make


def test_no_file_of_a_run_and_nothing_it_prints_holds_a_secret(config, tmp_path, capfd, caplog):
    """One task of three fails with the secret in its error; the others are told it in an answer."""
    given = config("Gossip")
    given["rollout"] |= {"max_attempts": 1, "max_failed_fraction": 0.9}
    with caplog.at_level("DEBUG", "miles"):
        miles.train(given, num_threads=1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    (dumped,) = (tmp_path / "run" / "rollouts").glob("*000001.jsonl")
    samples = [json.loads(line) for line in dumped.read_text().splitlines()]
    assert "[floor_key]" in dumped.read_text(), "it was told, and struck out"
    assert {sample["status"] for sample in samples} <= {"completed", "truncated", "failed"}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_middle_of_steps(config, worlds, tmp_path, times):
    """All sessions are closed, also when Ctrl-C comes a second time while they are being closed."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config("Thinker")))
    command = [sys.executable, "-m", "miles", "train", str(tmp_path / "config.yaml"), "--num-threads", "1"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(os.environ))
    try:
        wait(lambda: len(worlds.OPEN) == 6, run)
        time.sleep(1)  # the turns are short: by now all are being graded
        for _ in range(times):
            run.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said = run.communicate(timeout=25)[1]
    finally:
        run.kill()
    assert run.returncode != 0
    assert "SIGINT" in said
    wait(lambda: not worlds.OPEN)


def wait(condition, run=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run is None or run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
