"""Workers that die, raise or hang, and a driver that is killed: nothing is left behind, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from miniature import assert_same_end, assert_same_weights, job, sums_in

SABOTEUR = """
import os, signal, time
from contextlib import suppress
from pathlib import Path

from miles.builtins.generate import single_turn
from miles.builtins.losses import ppo_clip
from miles.builtins.options import PpoClipOptions

if os.environ.get("SABOTAGE") == "linger" and os.environ.get("RANK") == "1":
    Path(os.environ["MARKER"]).touch()
    time.sleep(1000)

calls = 0

def loss(inputs, options=None):
    global calls
    calls += 1
    how, marker = os.environ.get("SABOTAGE"), Path(os.environ["MARKER"])
    if how and calls == 7 and os.environ.get("RANK") == "1" and not (marker.exists() and how != "always"):
        marker.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(1000)
        raise ArithmeticError("deliberate failure")
    return ppo_clip(inputs, options=PpoClipOptions())

async def generate(context, sample):
    marker = Path(os.environ["MARKER"])
    if os.environ.get("SABOTAGE") == "freeze" and sample.id == 40 and not marker.exists():
        marker.touch()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                words = (folder / "cmdline").read_text().split("\\0")
                if "miles.workers.serve" in words and str(os.getpid()) in words and words[-5] == "1":
                    os.kill(int(folder.name), signal.SIGSTOP)
    return await single_turn(context, sample)

def judge(sample):
    return float(any(c.isdigit() for c in sample.text)) - 0.1 * sample.response_length
"""


@pytest.fixture(scope="module")
def command(checkpoint, tmp_path_factory):
    """A command line that trains on two ranks for six steps of two optimizer steps, saving every second one."""
    tmp_path = tmp_path_factory.mktemp("faults")
    config = job(checkpoint, sums_in(tmp_path), tmp_path)
    (tmp_path / "saboteur.py").write_text(SABOTEUR)
    for task_set in (*config["data"]["sets"], *config["eval"]["sets"]):
        task_set["reward"] = "saboteur:judge"
        task_set["generate"] = "saboteur:generate"
    config["algorithm"]["policy_loss"] = "saboteur:loss"
    config["rollout"]["num_rollout"] = 6
    config["checkpoint"] = {"interval": 2, "keep": 8}
    config["resources"] = {"actor_num_gpus_per_node": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def start(name, how="", *flags):
        words = [sys.executable, "-m", "miles", "train", "config.yaml", "--run-dir", name, "--no-report", *flags]
        paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        sabotage = {"SABOTAGE": how, "MARKER": str(tmp_path / f"{name}.done")}
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **sabotage}
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        process.folder = tmp_path
        return process

    return start


@pytest.fixture(scope="module")
def whole(command):
    """The run directory of one that nothing happens to."""
    process = command("whole")
    finish(process)
    return process.folder / "whole"


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert workers_of(process.pid) == []
    return errors


def workers_of(driver):
    """Processes that this driver has started as workers and that are still there."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "miles.workers.serve" in words and str(driver) in words:
            found.append(int(entry))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first", "flags"),
    [
        ("kill", "train rank 1 died in train_step", ()),
        ("raise", "train rank 1 failed in train_step", ()),
        ("hang", "train rank 1 does not answer in train_step", ("--worker-timeout", "8")),
        ("freeze", "rollout rank 1 does not answer in generate", ("--worker-timeout", "8")),
    ],
)
def test_a_run_that_lost_a_rank_goes_on_by_itself(command, whole, how, first, flags):
    errors = finish(command(how, how, "--max-restarts", "1", *flags))
    assert errors.index(first) < errors.index("restart 1 of 1")
    if how == "raise":
        assert errors.index(first) < errors.index("Traceback") < errors.index("ArithmeticError: deliberate failure")
    if how == "hang":
        assert "time.sleep(1000)" in errors
    assert_same_end(whole, whole.with_name(how))


@pytest.mark.slow
def test_so_does_one_under_ray(command, whole):
    """Its engines' batches are never twice the same, which rounds the log-probabilities that they tell, and no more."""
    pytest.importorskip("ray")
    errors = finish(command("ray", "kill", "--executor", "ray", "--max-restarts", "1"))
    assert errors.index("train rank 1 died in train_step") < errors.index("restart 1 of 1")
    assert_same_weights(whole, whole.with_name("ray"))


@pytest.mark.slow
def test_once_too_often(command):
    errors = finish(command("often", "always", "--max-restarts", "1"), code=1)
    assert errors.count("restart") == 1
    said = errors[errors.rindex("train rank 1 failed") :]
    assert "ArithmeticError: deliberate failure" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_while_it_is_built_ends_at_once(command, number, code):
    name = f"early-{code}"
    process = command(name, "linger")
    deadline = time.monotonic() + 200
    while not (process.folder / f"{name}.done").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers_of(process.pid)) == 2
    process.send_signal(number)
    errors = finish(process, code)
    assert "Traceback" not in errors
    assert errors.endswith(f"miles: stopped by {number.name}\n")
    summary = json.loads((process.folder / name / "summary.json").read_text())
    assert summary["status"] == "interrupted"


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along(command, whole):
    process = command("killed")
    for line in process.stderr:
        if line.startswith("step 3"):
            break
    assert len(workers_of(process.pid)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while (left := workers_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    finish(command("killed"))
    assert_same_end(whole, whole.with_name("killed"))
