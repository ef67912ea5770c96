"""The contract of trackers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from miles.protocols import RunInfo
from miles.testing.contract import ComponentContract

STEPS = ({"rollout/reward": 0.5, "train/loss": -1.25}, {"rollout/reward": 1.0, "time/step": 3})


class TrackerContract(ComponentContract):
    """`start(run)`, `log(step, metrics)`, `finish(status)`.

    Example:
        class TestJsonl(TrackerContract):
            name = "jsonl"
    """

    kind = "trackers"

    def logged(self, folder: Path) -> dict[int, dict[str, float]] | None:
        """What can be read back from a run directory: step -> metrics. None where the tracker keeps it elsewhere."""
        return None

    def info(self, folder: Path, resumed_from: int | None = None) -> RunInfo:
        return RunInfo("contract", folder, {"optimizer": {"lr": 1e-3}, "data": {"sets": [{"name": "x"}]}}, resumed_from)

    def run(self, folder: Path, steps: Any = STEPS, status: str = "completed", first: int = 0) -> None:
        tracker = self.build()
        tracker.start(self.info(folder, first or None))
        for step, metrics in enumerate(steps, first):
            tracker.log(step, dict(metrics))
        tracker.finish(status)

    def test_a_run_is_tracked(self, tmp_path: Path) -> None:
        """Start, steps, finish; what was logged is there, where it can be read back."""
        self.run(tmp_path)
        found = self.logged(tmp_path)
        if found is not None:
            assert found == {step: pytest.approx(metrics) for step, metrics in enumerate(STEPS)}

    def test_every_end_is_taken(self, tmp_path: Path) -> None:
        """Runs complete, are interrupted and fail; also before their first step, and before they were started."""
        for status in ("completed", "interrupted", "failed"):
            self.run(tmp_path / status, status=status)
        self.run(tmp_path / "empty", steps=())
        self.build().finish("failed")

    def test_numbers_of_every_sort(self, tmp_path: Path) -> None:
        """A loss that is not finite is when metrics are needed most; new names appear in the middle of a run."""
        odd: tuple[dict[str, float], ...] = (
            {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0, "e": 1e-300},
            {"eval/new set/reward": 1},
            {},
        )
        self.run(tmp_path, odd)

    def test_a_resumed_run_goes_on(self, tmp_path: Path) -> None:
        """The steps after the checkpoint are done again: each must be there once."""
        self.run(tmp_path, STEPS * 2)
        self.run(tmp_path, STEPS, first=2)
        found = self.logged(tmp_path)
        if found is not None:
            assert sorted(found) == [0, 1, 2, 3]

    def test_two_runs_in_one_process(self, tmp_path: Path) -> None:
        """From Python one run follows another: nothing of the first may be left."""
        self.run(tmp_path / "first")
        self.run(tmp_path / "second", STEPS[:1])
        found = self.logged(tmp_path / "second")
        if found is not None:
            assert sorted(found) == [0]

    def test_metrics_are_left_alone(self, tmp_path: Path) -> None:
        """The same mapping goes to every tracker, and into the run's summary."""
        tracker, metrics = self.build(), dict(STEPS[0])
        tracker.start(self.info(tmp_path))
        tracker.log(0, metrics)
        tracker.finish("completed")
        assert metrics == STEPS[0]

    def test_what_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        """A tracker must start or raise: a run that is not tracked is found out days later."""
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(Exception, match=r"."):
            self.run(tmp_path / "file" / "run")
