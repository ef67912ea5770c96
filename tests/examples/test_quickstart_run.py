"""examples/quickstart/run.sh: which commands it gives, by a `miles` and a `python` that write down their words; the
latter makes a folder where data are asked for. And what its show.py says of a run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def run(tmp_path):
    """Run a copy of the script; returns the process and the commands that it gave."""
    here = tmp_path / "examples" / "quickstart"
    shutil.copytree(EXAMPLE, here)
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    makes = f'if [ "$2" = --out ]; then mkdir "$3"; [ ! -e {tmp_path}/killed ]; fi\n'
    for name, does in (("miles", ""), ("python", makes)):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" in "$(basename "$PWD")" >> {log}\n{does}')
        (programs / name).chmod(0o755)

    def call(*words):
        log.write_text("")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", here / "run.sh", *words], capture_output=True, text=True, env=environment)
        return done, log.read_text().replace(f"{here}/", "").splitlines()

    return call


def test_without_flags_it_is_the_recipe(run):
    done, commands = run()
    assert done.returncode == 0, done.stderr
    assert commands == [
        "python prepare.py --out data.part --seed 1 in seed-1",
        "miles train sft.yaml --seed 1 --rollout-seed 1 in seed-1",
        "miles train grpo.yaml --seed 1 --rollout-seed 1 --run-dir grpo --run-name quickstart-grpo in seed-1",
        "python show.py grpo in seed-1",
    ]


def test_data_that_were_cut_short_are_made_again_and_others_are_not(run, tmp_path):
    (tmp_path / "killed").touch()
    assert run()[0].returncode != 0
    (tmp_path / "killed").unlink()
    made = [[command for command in run()[1] if "prepare.py" in command] for _ in range(2)]
    assert [len(commands) for commands in made] == [1, 0]


def test_flags_go_to_the_reinforcement_learning_and_the_warm_up_is_shared(run):
    _, commands = run("--run", "rloo", "--advantage-estimator", "rloo", "--seed", "3", "--lr", "1e-4")
    assert commands[1] == "miles train sft.yaml --seed 3 --rollout-seed 3 in seed-3"
    assert commands[2] == (
        "miles train grpo.yaml --seed 3 --rollout-seed 3 --run-dir rloo --run-name quickstart-rloo "
        "--advantage-estimator rloo --lr 1e-4 in seed-3"
    )
    assert commands[3] == "python show.py rloo in seed-3"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed"], "--seed needs a value"),
        (["--run", ""], "--run needs a value"),
        (["--run", "sft"], "--run sft: a plain name, and not data or sft"),
        (["--run", "a/b"], "--run a/b: a plain name, and not data or sft"),
        (["--lr", "1e-4"], "with flags of its own the run needs a name of its own: --run NAME"),
    ],
)
def test_what_it_refuses(run, words, said):
    done, commands = run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert commands == []


def test_what_was_learned_is_shown_also_of_runs_that_evaluate_nothing_or_keep_no_samples(tmp_path):
    def shown(evaluation, samples):
        (tmp_path / "rollouts").mkdir(exist_ok=True)
        summary = {"steps": 4, "seconds": 8.0, "evaluation": evaluation}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        for step, sample in samples.items():
            (tmp_path / "rollouts" / f"step_00000{step}.jsonl").write_text(json.dumps(sample) + "\n")
        words = [sys.executable, EXAMPLE / "show.py", tmp_path]
        return subprocess.run(words, text=True, capture_output=True, check=True).stdout

    bare = shown({}, {})
    assert "4 steps in 8 seconds" in bare
    assert "greedy" not in bare
    answer = {"prompt": "1+2=", "response": "4", "label": "3", "reward": 0}
    whole = shown({"heldout": {when: {"accuracy": 0.25} for when in ("first", "last")}}, {1: {}, 2: answer})
    assert re.search(r"greedy +0\.250 +0\.250\n", whole)
    assert re.search(r"1\+2=4 +wrong, 3 is right", whole)
