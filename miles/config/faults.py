"""What is wrong with a configuration: all of it, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from miles.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    kind: Literal["default", "preset", "file", "flag", "python", "inherited"]
    where: str = ""
    """`run.yaml:12`, `--lr`, `preset 'gspo' of ...`."""

    def __str__(self) -> str:
        return self.where or self.kind


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
        origin = f"   ({self.origin})" if self.origin else ""
        lines = [f"  {self.key}{value}{origin}", f"      {self.problem}"]
        lines += [f"      meaning: {self.meaning}"] if self.meaning else []
        lines += [f"      fix: {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


class ConfigFaults(ConfigError):
    """Everything that is wrong with a configuration, in one error."""

    def __init__(self, faults: Sequence[Fault]):
        self.faults = tuple(faults)
        count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(map(str, faults)))


def _short(value: Any) -> str:
    text = repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= 120 else text[:117] + "..."
