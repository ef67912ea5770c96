"""Trackers that need no service: `jsonl`, a line a step in the run directory, and `tensorboard`, event files."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, TextIO

from miles.api import ConfigError, Metrics, RunInfo

METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger("miles")


class JsonlTracker:
    """Writes `metrics.jsonl`: one object a step, `{"step": 3, "rollout/reward": 0.5, ...}`.

    Every line is in the file before `log` returns. A run that goes on from step `n` first drops what its predecessor
    wrote for `n` and later, and a last line that was cut off, so that each step is there once. Numbers that JSON
    does not know (infinite, not a number) are null.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, run: RunInfo) -> None:
        path = run.directory / METRICS_FILE
        if path.exists():
            keep_before(path, run.resumed_from or 0)
        self._open(path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        assert self._file is not None, "log before start"
        path = Path(self._file.name)
        if not path.exists():
            self.finish("lost")
            self._open(path)
            logger.warning(
                "%s was deleted or moved while the run went on: what it had until then is lost here, unless "
                "you moved it; a new one begins with step %d", path, step
            )  # fmt: skip
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that are of `step` or later, or that are no JSON; atomically."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(fresh, path)


def _step_of(line: str) -> float:
    try:
        row = json.loads(line)
    except ValueError:
        return math.inf
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else math.inf


class TensorboardTracker:
    """Writes TensorBoard event files to `tensorboard/` of the run directory.

    A run that goes on tells TensorBoard to forget its predecessor's later steps.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        """Raises ConfigError when TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tracking: tensorboard is not installed ({error}): pip install 'miles[tensorboard]'"
            ) from error
        directory = run.directory / "tensorboard"
        self._writer = SummaryWriter(str(directory), purge_step=run.resumed_from or 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
