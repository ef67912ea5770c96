"""Trackers fail politely, and the progress line says what matters."""

import io

import pytest

from miles.protocols import RunInfo
from miles.tracking import Progress, Tracking, dump_samples
from miles.types import LOSS_MASK, Group, Prompt, Sample, Status


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


def test_a_failed_sample_is_dumped_with_its_reason(tmp_path):
    sample = Sample.begin(Prompt(id="s:0", task_set="s", text="x", tokens=[1]), id=3, group_id=0)
    sample.append([2], {LOSS_MASK: 1})
    sample.status, sample.error = Status.FAILED, "ValueError: no"
    dump_samples(tmp_path, 7, [Group(0, sample.prompt, [sample, sample])], limit=1)
    (line,) = (tmp_path / "step_000007.jsonl").read_text().splitlines()
    assert '"status": "failed"' in line
    assert '"error": "ValueError: no"' in line
    assert '"loss_mask": [0, 1]' in line
