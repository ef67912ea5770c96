"""What a run directory says of its run: settings, summary, plugins, metrics, and where its samples lie."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from miles.errors import ConfigError
from miles.report.dump import FOLDER
from miles.rundir import LOCK, METRICS, SETTINGS, SUMMARY, leaves

PLUGINS = "plugins.json"
MAX_ROWS = 10_000
"""A longer run's metrics are thinned: a screen has fewer columns than that."""


@dataclass
class RunRecord:
    """One run, as far as its directory tells."""

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    plugins: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    """One a step: `step` and metrics."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the report has to know about its gaps."""

    @property
    def name(self) -> str:
        return str(self.config.get("run", {}).get("name") or self.directory.name)

    @property
    def status(self) -> str:
        """`completed`, `interrupted`, `failed`, `running`, or `unfinished`: no process holds it, and none ended it."""
        last = self.rows[-1]["step"] if self.rows else 0
        if "status" in self.summary and self.summary.get("steps", last) >= last:
            return self.summary["status"]
        return "running" if _is_held(self.directory) else "unfinished"

    @property
    def ended(self) -> str | None:
        """When it ended, in ISO form; else when it last wrote."""
        if "ended" in self.summary:
            return self.summary["ended"]
        files = [path for name in (SUMMARY, METRICS, SETTINGS) if (path := self.directory / name).exists()]
        newest = max((path.stat().st_mtime for path in files), default=None)
        return None if newest is None else datetime.fromtimestamp(newest).astimezone().isoformat(timespec="seconds")

    @property
    def dumps(self) -> list[tuple[int, Path]]:
        """Steps and the files of their samples, in order."""
        files = sorted((self.directory / FOLDER).glob("step_*.jsonl"))
        return [(int(path.stem.removeprefix("step_")), path) for path in files if path.stem[5:].isdigit()]

    def columns(self) -> dict[str, list[float | None]]:
        """Metric -> a value for every row, None where a row has none."""
        names = dict.fromkeys(chain.from_iterable(self.rows))
        return {name: [_plain(row.get(name)) for row in self.rows] for name in names}


def read_run(directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such directory; `miles report` takes run directories (run.dir)")
    if not (directory / SETTINGS).is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{SETTINGS}"))
        hint = f"; it holds run directories, though: {', '.join(inside)}" if inside else ""
        raise ConfigError(f"{directory} is no run directory: it has no {SETTINGS}{hint}")
    notes: list[str] = []
    config = _read_mapping(directory / SETTINGS, notes)
    summary = _read_mapping(directory / SUMMARY, notes) if (directory / SUMMARY).is_file() else {}
    plugins: list[dict[str, Any]] = []
    if (directory / PLUGINS).is_file():
        with _noted(directory / PLUGINS, notes):
            plugins = json.loads((directory / PLUGINS).read_text(encoding="utf-8"))
    rows = _thinned(list(_read_rows(directory / METRICS, notes)), notes)
    run = RunRecord(directory, config, summary, plugins, rows, notes)
    run.notes += _missing(run)
    return run


def _missing(run: RunRecord) -> list[str]:
    """What the directory lacks, why that may be, and what can therefore not be shown."""

    def lacks(name: str) -> bool:
        return not (run.directory / name).exists()

    unwanted = (run.config.get("rollout") or {}).get("dump_samples") == 0
    checks = [
        (
            lacks(SUMMARY) and run.status != "running",
            f"{SUMMARY} (the run was killed, or the file removed): its error, if it had one, the time it took, tokens, "
            "versions, and first and last evaluations are not shown",
        ),
        (
            lacks(METRICS),
            f"{METRICS} (no step was finished, or the file was removed): curves, reward and speed are not shown",
        ),
        (
            not run.dumps and not unwanted,
            f"{FOLDER}/step_NNNNNN.jsonl (no step was finished, or the folder was removed): samples are not shown",
        ),
        (lacks(PLUGINS), f"{PLUGINS} (the file was removed): plugins are not shown"),
    ]
    return [f"there is no {what}" for lacking, what in checks if lacking]


class _noted(suppress):
    """A file that cannot be read is a note, not the end of the report."""

    def __init__(self, path: Path, notes: list[str]):
        super().__init__(OSError, ValueError, yaml.YAMLError)
        self.path, self.notes = path, notes

    def __exit__(self, kind, error, trace) -> bool:
        handled = super().__exit__(kind, error, trace)
        if error is not None and handled:
            self.notes.append(f"{self.path.name} cannot be read: {error}")
        return handled


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A YAML or JSON file with a mapping in it."""
    with _noted(path, notes):
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(found, dict):
            return found
        notes.append(f"{path.name} holds no mapping")
    return {}


def read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one after the other; a line that is none is a note."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                yield found
            else:
                where = "ends within it" if not line.endswith("\n") else "goes on after it"
                notes.append(f"line {number} of {path.name} is no whole JSON object and is left out (the file {where})")


def _read_rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for row in read_lines(path, notes):
            if isinstance(row.get("step"), int):
                yield row
            else:
                notes.append(f"a line of {path.name} has no step and is left out")


def _thinned(rows: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """At most about MAX_ROWS of them: evenly spaced ones, and those with an evaluation."""
    if len(rows) <= MAX_ROWS:
        return rows
    every = math.ceil(len(rows) / MAX_ROWS)
    kept = [row for i, row in enumerate(rows) if i % every == 0 or any(name.startswith("eval/") for name in row)]
    notes.append(
        f"curves show every {every}th of {len(rows):,} steps, and every evaluation; metrics.jsonl has them all"
    )
    return kept


def _plain(value: Any) -> float | None:
    """Six digits: more than a screen shows."""
    finite = isinstance(value, int | float) and math.isfinite(value)
    return float(f"{value:.6g}") if finite else None


def _is_held(directory: Path) -> bool:
    """Whether a process holds the directory, that is, a run goes on in it."""
    try:
        with (directory / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Short names that tell the runs apart: their own, with as much of the path as that takes."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [run.directory.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths))):
        tails = ["/".join(path[-depth:]) for path in paths]
        if len(set(tails)) == len(tails):
            return tails
    return [f"{name} {number}" for number, name in enumerate(names, 1)]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same in all of them: `key`, and `values` as text, None where a run has no such key."""
    flat = [leaves(config) for config in configs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    missing = object()
    rows = []
    for key in keys:
        values = [settings.get(key, missing) for settings in flat]
        if key != "run.dir" and any(value != values[0] for value in values[1:]):
            rows.append({"key": key, "values": [None if v is missing else _text(v) for v in values]})
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
