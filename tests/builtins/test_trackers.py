"""Metrics on disk: one line a step, whatever happened to the run in between."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest

from miles.api import ConfigError, RunInfo, Tracker
from miles.builtins.trackers import JsonlTracker, TensorboardTracker


def run_in(directory, resumed_from=None):
    return RunInfo("test", directory, {}, resumed_from)


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def log_steps(directory, steps, resumed_from=None, value=0.0):
    tracker = JsonlTracker()
    tracker.start(run_in(directory, resumed_from))
    for step in steps:
        tracker.log(step, {"loss": value + step})
    tracker.finish("completed")


def test_a_line_a_step(tmp_path):
    log_steps(tmp_path / "new", [0, 1])
    assert lines_of(tmp_path / "new") == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 1.0}]
    assert isinstance(JsonlTracker(), Tracker)


def test_a_line_is_in_the_file_before_log_returns(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from miles.api import RunInfo; "
        "from miles.builtins.trackers import JsonlTracker; t = JsonlTracker(); "
        "t.start(RunInfo('x', Path(sys.argv[1]), {})); t.log(4, {'a': 1.0}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert ended.returncode == -signal.SIGKILL
    assert lines_of(tmp_path) == [{"step": 4, "a": 1.0}]


def test_a_resumed_run_has_each_step_once(tmp_path):
    log_steps(tmp_path, range(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log_steps(tmp_path, range(3, 8), resumed_from=3, value=10.0)
    assert [(row["step"], row["loss"]) for row in lines_of(tmp_path)] == [
        *((step, float(step)) for step in range(3)),
        *((step, 10.0 + step) for step in range(3, 8)),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_deleted_file_is_begun_anew_and_said(tmp_path, caplog):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker()
    tracker.start(run_in(path.parent))
    tracker.log(0, {"a": 1.0})
    shutil.rmtree(path.parent)
    tracker.log(1, {"a": 2.0})
    tracker.finish("completed")
    assert path.read_text() == '{"step": 1, "a": 2.0}\n'
    assert "was deleted or moved while the run went on" in caplog.text


def test_a_run_that_starts_anew_in_the_same_directory_starts_the_file_anew(tmp_path):
    log_steps(tmp_path, range(4))
    log_steps(tmp_path, range(2), value=5.0)
    assert [row["loss"] for row in lines_of(tmp_path)] == [5.0, 6.0]


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    tracker = JsonlTracker()
    tracker.start(run_in(tmp_path))
    tracker.log(0, {"a": math.nan, "b": -math.inf, "c": 1})
    assert lines_of(tmp_path) == [{"step": 0, "a": None, "b": None, "c": 1.0}]


def test_tensorboard_reads_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps, resumed_from in ((range(5), None), (range(3, 6), 3)):
        tracker = TensorboardTracker()
        assert isinstance(tracker, Tracker)
        tracker.start(run_in(tmp_path, resumed_from))
        for step in steps:
            tracker.log(step, {"loss": float(step), "reward": 1.0})
        tracker.finish("completed")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, float(step)) for step in range(6)]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'miles\[tensorboard\]'"):
        TensorboardTracker().start(run_in(tmp_path))
