"""Results for people: a table of medians, and beside them what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from miles.bench.compare import Comparison
from miles.bench.measure import YARDSTICK, Measured
from miles.bench.record import Results
from miles.log import counted

BUSY = 0.1
"""Contention that is worth a remark."""


def printed(results: Results, comparison: Comparison | None = None) -> str:
    """Everything that `miles bench` says at its end."""
    rows = [("", "median", "spread", "unit")]
    rows += [(name, _number(m.median), _spread(m), m.unit) for name, m in results.measured.items()]
    lines = [_machine(results), "", *_aligned(rows), *_remarks(results)]
    if comparison is not None:
        lines += ["", *_comparison(comparison)]
    return "\n".join(lines)


def _machine(results: Results) -> str:
    about = results.machine
    place = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads"
    libraries = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    return f"{place}; size {results.size}; {libraries}"


def _remarks(results: Results) -> Iterator[str]:
    contention = [median(seen.contention) for seen in results.circumstances.values() if seen.contention]
    if contention and median(contention) > BUSY:
        yield f"threads waited for a core {median(contention):.0%} of the time: look at the spreads"
    for name, reason in results.skipped.items():
        yield f"{name}: left out, it {reason}"
    for name, error in results.errors.items():
        yield f"{name}: FAILED: {error}"
    if results.interrupted:
        yield "interrupted: these are the rounds until then"


def _comparison(comparison: Comparison) -> Iterator[str]:
    if comparison.differences:
        yield "warning: the baseline is of other circumstances: " + "; ".join(comparison.differences)
    rows = [("", "baseline", "now", "change", "")]
    rows += [
        (change.name, _number(change.before), _number(change.now), f"{change.relative:+.1%}", change.verdict)
        for change in comparison.changes
    ]
    yield from _aligned(rows)
    for change in comparison.changes:
        if change.name == YARDSTICK and change.verdict == "changed":
            yield f"the machine itself moved by {change.relative:+.1%} ({YARDSTICK}): so much may be its own doing"
    for name in comparison.missing:
        yield f"{name}: in the baseline, but not measured now"
    for name in comparison.added:
        yield f"{name}: not in the baseline"
    count = len(comparison.regressions)
    yield counted(count, "regression") if count else "no regression"


def _number(value: float) -> str:
    """Four digits that mean something, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(measured: Measured) -> str:
    return f"{measured.spread / abs(measured.median):.1%}" if measured.median else "-"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first and the last column to the left, numbers between them to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
