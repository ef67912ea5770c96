"""Trackers fail politely, and the progress line says what matters."""

import io

import pytest

from miles.protocols import RunInfo
from miles.tracking import Progress, Tracking


class Notebook:
    def __init__(self, breaks_at=None, starts=True):
        self.breaks_at, self.starts, self.lines = breaks_at, starts, []

    def start(self, run):
        if not self.starts:
            raise RuntimeError("no network")

    def log(self, step, metrics):
        if step == self.breaks_at:
            raise OSError("disk full")
        self.lines.append((step, metrics))

    def finish(self, status):
        self.lines.append(status)


def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(caplog):
    good, bad = Notebook(), Notebook(breaks_at=2)
    tracking = Tracking([("bad", bad), ("good", good)])
    for step in range(4):
        tracking.log(step, {"x": step})
    tracking.finish("completed")
    assert good.lines == [(step, {"x": step}) for step in range(4)] + ["completed"]
    assert bad.lines == [(0, {"x": 0}), (1, {"x": 1})]
    assert caplog.text.count("tracker bad failed") == 1


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="no network"):
        Tracking([("bad", Notebook(starts=False))]).start(RunInfo("run", tmp_path, {}))


def test_the_progress_line():
    out = io.StringIO()
    progress = Progress(4, out)
    progress.line(0, {"eval/heldout/accuracy": 0.25, "eval/heldout/reward": 0.5})
    progress.line(
        1, {"rollout/reward": 0.5, "rollout/accuracy": 0.25, "train/loss": -0.01, "perf/tokens_per_second": 12345}
    )
    first, second = out.getvalue().splitlines()
    assert first == "step 0/4  heldout/accuracy 0.250"
    assert second.startswith("step 1/4  reward 0.500  acc 0.250  loss -0.0100  tok/s 12,345  left 0m0")
