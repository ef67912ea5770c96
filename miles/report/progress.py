"""A run in the terminal: one line a step."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

from miles.types import Metrics

COLUMNS = (
    ("reward", "rollout/reward", ".3f"),
    ("acc", "rollout/accuracy", ".3f"),
    ("len", "rollout/response_len/mean", ".1f"),
    ("loss", "train/loss", ".4f"),
    ("grad", "train/grad_norm", ".3f"),
    ("tok/s", "perf/tokens_per_second", ",.0f"),
)
"""What is shown of a step that has it."""


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


def _headline(key: str) -> bool:
    return key.startswith("eval/") and key.endswith("/accuracy")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
