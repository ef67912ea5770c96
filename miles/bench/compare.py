"""What changed since a baseline. Pure.

A quantity changed when its median moved by more than 5 % and by more than the spreads of both sides together: a
machine that is shared moves medians by itself. Neither test is enough alone. What is slower then is a regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles.bench.measure import Better, Measured

LIMIT = 0.05
"""Relative change of a median that is worth saying."""

Verdict = Literal["regression", "improvement", "changed", "within noise", "same"]


@dataclass(frozen=True)
class Change:
    """One quantity on both sides."""

    name: str
    unit: str
    before: float
    now: float
    noise: float
    """Sum of both spreads, in the quantity's unit."""
    better: Better

    @property
    def relative(self) -> float:
        """`now / before - 1`; 0 when both are 0, infinite when only `before` is."""
        if self.before == self.now:
            return 0.0
        if self.before == 0:
            return float("inf") if self.now > 0 else float("-inf")
        return (self.now - self.before) / abs(self.before)

    @property
    def verdict(self) -> Verdict:
        if abs(self.relative) <= LIMIT:
            return "same"
        if abs(self.now - self.before) <= self.noise:
            return "within noise"
        if self.better == "neither":
            return "changed"
        return "improvement" if (self.now > self.before) == (self.better == "higher") else "regression"


@dataclass(frozen=True)
class Comparison:
    """Everything that two sets of results say of each other."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    """In the baseline alone."""
    added: tuple[str, ...]
    """Not in the baseline."""
    differences: tuple[str, ...]
    """Of machine, versions and settings: `torch: 2.12.0 -> 2.13.0`."""

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "regression"]


def compare(
    before: Mapping[str, Measured], now: Mapping[str, Measured], settings_before: Mapping, settings_now: Mapping
) -> Comparison:
    """`now` against `before`; settings are whatever should be equal for the comparison to mean much."""
    both = [name for name in now if name in before]
    return Comparison(
        changes=tuple(_change(name, before[name], now[name]) for name in both),
        missing=tuple(name for name in before if name not in now),
        added=tuple(name for name in now if name not in before),
        differences=tuple(_differences(settings_before, settings_now)),
    )


def _change(name: str, before: Measured, now: Measured) -> Change:
    return Change(name, now.unit, before.median, now.median, before.spread + now.spread, now.better)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)} -> {now.get(key)}"
