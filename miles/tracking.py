"""Metrics to all trackers.

A tracker that cannot start stops the run before it began; one that fails later is warned of once and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
