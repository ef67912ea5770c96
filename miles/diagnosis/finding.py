"""What a check found, and how checks are kept apart from each other. Standard library only."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["ok", "info", "warn", "missing", "fault"]
Job = Literal["training", "gpu"]
"""`training` of any kind; training on a `gpu`."""
TRAINING: tuple[Job, ...] = ("training",)
GPU: tuple[Job, ...] = ("gpu",)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    mark: Mark
    """ok: as it should be. info: good to know. warn: works, though not as well as it could. missing: not installed.
    fault: broken."""
    found: str
    remedy: str = ""
    """What to do, in one line."""
    stops: tuple[Job, ...] = ()
    """What cannot be done as long as this is so."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind it, for programs."""


@dataclass(frozen=True)
class Section:
    """Findings on one matter."""

    name: str
    findings: tuple[Finding, ...]


Check = Callable[[], Iterable[Finding]]


def examine(name: str, *checks: Check) -> Section:
    """Run checks one after the other. One that raises adds a finding of its own; the others are not affected."""
    findings: list[Finding] = []
    for check in checks:
        try:
            for finding in check():
                findings.append(finding)  # one by one: what was found before a crash is kept
        except Exception as error:
            findings.append(_crashed(check, error))
    return Section(name, tuple(findings))


def _crashed(check: Check, error: Exception) -> Finding:
    lacking = isinstance(error, ImportError)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(
        getattr(check, "__name__", getattr(getattr(check, "func", None), "__name__", "check")).strip("_"),
        "fault",
        f"this check crashed: {type(error).__name__}: {error} ({last.filename}:{last.lineno})",
        "install what it lacks" if lacking else "the other lines hold all the same; please report this one",
    )
