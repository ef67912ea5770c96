"""Trackers fail politely."""

import pytest

from miles.protocols import RunInfo
from miles.tracking import Tracking


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
