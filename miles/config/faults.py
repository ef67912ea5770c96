"""What is wrong with a configuration: all of it, in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from miles.config.base import Spec
from miles.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    kind: Literal["default", "preset", "file", "flag", "python", "inherited"]
    where: str = ""
    """`run.yaml`, `--lr`, `preset 'gspo' of ...`."""
    line: int | None = None
    """In a file."""

    def __str__(self) -> str:
        return f"{self.where}:{self.line}" if self.line else self.where or self.kind

    def of(self, mapping: Mapping, key: Any) -> Origin:
        """That of a key in a mapping that comes from here: in a file its line, or the first of the mapping's."""
        lines = getattr(mapping, "lines", None)
        return replace(self, line=lines.get(key, min(lines.values()))) if lines and self.kind == "file" else self


DEFAULT = Origin("default")
MISSING = object()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    key: str
    problem: str
    remedy: str = ""
    value: Any = MISSING
    origin: Origin | None = None
    meaning: str = ""
    """What the setting is, where its value is of the wrong kind and nobody can say which was meant."""

    def __str__(self) -> str:
        value = "" if self.value is MISSING else f" = {_short(self.value)}"
        origin = f"   ({self.origin})" if self.origin and str(self.origin) not in self.key else ""
        lines = [f"  {self.key}{value}{origin}", f"      {self.problem}"]
        lines += [f"      meaning: {self.meaning}"] if self.meaning else []
        lines += [f"      fix: {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


class ConfigFaults(ConfigError):
    """Everything that is wrong with a configuration, in one error.

    `resolved` is the configuration (`miles.config.load.Resolved`) where it could be made in spite of it: there may be
    more to find.
    """

    def __init__(self, faults: Sequence[Fault], resolved: Any = None):
        self.faults, self.resolved = tuple(faults), resolved
        told = _together(faults)
        count = "1 problem" if len(told) == 1 else f"{len(told)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(map(str, told)))


def _together(faults: Sequence[Fault]) -> list[Fault]:
    """Flags that are wrong for one reason are one problem, and each is named once."""
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for fault in faults:
        alike = ("--", fault.problem, fault.remedy, fault.meaning) if fault.key.startswith("--") else (str(fault),)
        groups.setdefault(alike, []).append(fault)
    return [replace(those[0], key=", ".join(dict.fromkeys(f.key for f in those))) for those in groups.values()]


def _short(value: Any) -> str:
    text = repr(str(value) if isinstance(value, str | Spec | Path) else value)
    return text if len(text) <= 120 else text[:117] + "..."
