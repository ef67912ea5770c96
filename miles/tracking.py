"""Metrics to all trackers, a line to the terminal.

A tracker that cannot start stops the run before it began; one that fails later is warned of once and left out.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TextIO

from miles.log import logger
from miles.protocols import RunInfo, Tracker
from miles.types import Metrics


class Tracking:
    """Fans metrics out to the trackers."""

    def __init__(self, trackers: Sequence[tuple[str, Tracker]]):
        self.trackers = list(trackers)

    def start(self, info: RunInfo) -> None:
        for _, tracker in self.trackers:
            tracker.start(info)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each("log", step, metrics)

    def finish(self, status: str) -> None:
        self._each("finish", status)

    def _each(self, method: str, *arguments: Any) -> None:
        for entry in list(self.trackers):
            name, tracker = entry
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self.trackers.remove(entry)
                logger.warning(
                    "tracker %s failed and is left out from now on: %s: %s", name, type(error).__name__, error
                )


class Progress:
    """One line a step: reward, accuracy, lengths, tokens per second, time left."""

    def __init__(self, total: int, out: TextIO | None = None):
        self.total = total
        self.out = out or sys.stderr
        self.recent: deque[float] = deque(maxlen=20)
        self.last = time.perf_counter()

    def line(self, step: int, metrics: Metrics) -> None:
        now = time.perf_counter()
        if step:
            self.recent.append(now - self.last)
        self.last = now
        parts = [f"step {step}/{self.total}"]
        for label, key, form in COLUMNS:
            if key in metrics:
                parts.append(f"{label} {metrics[key]:{form}}")
        if failed := metrics.get("rollout/failed_ratio"):
            parts.append(f"failed {failed:.0%}")
        parts += [f"{k.removeprefix('eval/')} {v:.3f}" for k, v in metrics.items() if _headline(k)]
        if self.recent and step < self.total:
            parts.append(f"left {_clock((self.total - step) * sum(self.recent) / len(self.recent))}")
        print("  ".join(parts), file=self.out, flush=True)


COLUMNS = (
    ("reward", "rollout/reward", ".3f"),
    ("acc", "rollout/accuracy", ".3f"),
    ("len", "rollout/response_len/mean", ".1f"),
    ("loss", "train/loss", ".4f"),
    ("grad", "train/grad_norm", ".3f"),
    ("tok/s", "perf/tokens_per_second", ",.0f"),
)


def _headline(key: str) -> bool:
    return key.startswith("eval/") and key.endswith("/accuracy")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
