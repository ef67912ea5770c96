"""Results as JSON: what `--json` and `--save-baseline` write and `--baseline` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from miles.bench.measure import Circumstances, Measured
from miles.errors import ConfigError

SCHEMA = 1
"""Number of the format; a file of another one is refused."""


@dataclass
class Results:
    """What a call of `miles bench` found."""

    versions: dict[str, str]
    machine: dict[str, Any]
    size: str
    """Which sizes of workloads: numbers of two sizes have nothing to do with each other."""
    device: str
    measured: dict[str, Measured] = field(default_factory=dict)
    circumstances: dict[str, Circumstances] = field(default_factory=dict)
    """By benchmark, not by quantity."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Benchmark -> what it needs and is not there."""
    errors: dict[str, str] = field(default_factory=dict)
    """Benchmark -> how it failed."""
    interrupted: bool = False

    @property
    def whole(self) -> bool:
        """Whether every benchmark that could run did, to the end."""
        return not self.errors and not self.interrupted

    @property
    def settings(self) -> dict[str, Any]:
        """What should be equal on both sides of a comparison."""
        return {**self.versions, **self.machine, "device": self.device}

    def as_json(self) -> str:
        quantities = {
            name: {**vars(found), "median": found.median, "spread": found.spread}
            for name, found in self.measured.items()
            if found.rounds
        }
        rest = {key: value for key, value in vars(self).items() if key not in ("measured", "circumstances")}
        circumstances = {name: asdict(seen) for name, seen in self.circumstances.items()}
        whole = {"schema": SCHEMA, **rest, "quantities": quantities, "circumstances": circumstances}
        return json.dumps(whole, indent=1) + "\n"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_json(), encoding="utf-8")


def read_results(path: Path) -> Results:
    """Raises ConfigError when it is no file of results, or one of another schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; make a baseline with --save-baseline") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}; make a baseline with --save-baseline") from error
    schema = found.get("schema") if isinstance(found, Mapping) else None
    if schema != SCHEMA:
        raise ConfigError(
            f"{path} has schema {schema}, this version of miles reads {SCHEMA}: make it anew with --save-baseline"
        )
    try:
        return Results(
            versions=found["versions"],
            machine=found["machine"],
            size=found["size"],
            device=found["device"],
            measured={
                name: Measured(entry["unit"], entry["better"], [float(value) for value in entry["rounds"]])
                for name, entry in found["quantities"].items()
            },
            circumstances={name: Circumstances(**seen) for name, seen in found["circumstances"].items()},
            skipped=found["skipped"],
            errors=found["errors"],
            interrupted=found["interrupted"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} lacks something that results have: {error!r}; make it anew") from error
