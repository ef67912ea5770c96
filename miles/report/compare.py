"""Where two runs part: the first token that differs, the metrics, the weights at the end.

Runs that ought to be the same (on another number of ranks, from another engine, resumed) rarely differ everywhere at
once: rounding moves a log-probability, some step later a draw falls on the other side, and from there everything is
different. The first differing token says when, and in which sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from miles.errors import CheckpointError, ConfigError
from miles.report.dump import FOLDER
from miles.rundir import METRICS

EXPORT = "hf"
"""Folder of a run's Hugging Face export, with `--save-hf hf`."""
MANNER = (
    "perf/", "time", "weight_sync/", "rollout/cached_ratio", "rollout/generated_tokens", "train/oom_retries",
    "critic/oom_retries",
)  # fmt: skip
"""Metrics that say how something was done, and not what: they differ between any two runs."""


@dataclass(frozen=True)
class Token:
    """The first token that two runs do not share."""

    step: int
    sample: int
    position: int
    found: tuple[Any, Any]
    responses: tuple[str, str]

    def __str__(self) -> str:
        a, b = self.found
        return (
            f"step {self.step}, sample {self.sample}, token {self.position}: {a} and {b}\n"
            f"  responses {self.responses[0]!r} and {self.responses[1]!r}"
        )


@dataclass
class Comparison:
    steps: int = 0
    """That both runs have."""
    tokens: int = 0
    """Compared, of samples that both runs have dumped."""
    first_token: Token | None = None
    metrics: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """Of each metric the step at which it differs most, and its values there."""
    weights: float | None = None
    """Largest difference of a number in the exported checkpoints; None where one of the runs has none."""
    weights_name: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether the runs are the same: every token, and every number to a tolerance relative to its size, or to 1."""
        apart = [distance_of(a, b) for _, a, b in self.metrics.values()]
        sizes = [max(1.0, abs(a), abs(b)) for _, a, b in self.metrics.values()]
        near = all(distance <= tolerance * size for distance, size in zip(apart, sizes, strict=True))
        return self.first_token is None and near and (self.weights or 0.0) <= tolerance


def compare(first: Path, second: Path) -> Comparison:
    """Raises ConfigError: one of them is no run directory, or they have no step in common."""
    ours, theirs = _metrics(first), _metrics(second)
    steps = sorted(ours.keys() & theirs.keys())
    if not steps:
        raise ConfigError(f"{first} and {second} have no step in common")
    found = Comparison(steps=len(steps))
    for step in steps:
        for name in sorted(ours[step].keys() & theirs[step].keys()):
            a, b = (math.nan if line[name] is None else line[name] for line in (ours[step], theirs[step]))
            if not name.startswith(MANNER) and all(isinstance(value, int | float) for value in (a, b)):
                _, *before = found.metrics.get(name, (0, 0.0, 0.0))
                if name not in found.metrics or distance_of(a, b) > distance_of(*before):
                    found.metrics[name] = (step, a, b)
    for step in steps:
        for ours_of_it, theirs_of_it in _samples(first, second, step):
            found.tokens += len(ours_of_it["tokens"])
            if ours_of_it["tokens"] != theirs_of_it["tokens"] and found.first_token is None:
                found.first_token = _parting(step, ours_of_it, theirs_of_it)
    _weights(found, first, second)
    return found


def distance_of(a: float, b: float) -> float:
    """Of two metrics; what is no number (NaN) is infinitely far from what is one."""
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b)


def _metrics(run: Path) -> dict[int, Mapping[str, Any]]:
    path = run / METRICS
    if not path.is_file():
        raise ConfigError(f"{run} is no run directory, or no step of it has ended: there is no {METRICS}")
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines}


def _samples(first: Path, second: Path, step: int) -> Iterator[tuple[Mapping, Mapping]]:
    """Those of one step that both runs have dumped."""
    by_id = []
    for run in (first, second):
        path = run / FOLDER / f"step_{step:06d}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        by_id.append({(record["id"], record.get("rollout_id")): record for record in map(json.loads, lines)})
    ours, theirs = by_id
    yield from ((ours[key], theirs[key]) for key in ours if key in theirs)


def _parting(step: int, a: Mapping, b: Mapping) -> Token:
    pairs = zip(a["tokens"], b["tokens"], strict=False)
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    found = tuple(record["tokens"][at] if at < len(record["tokens"]) else "nothing" for record in (a, b))
    return Token(step, a["id"], at, found, (a["response"], b["response"]))  # type: ignore[arg-type]


def _weights(found: Comparison, first: Path, second: Path) -> None:
    from miles.checkpoint_io import read_weights

    folders = [run / EXPORT for run in (first, second)]
    if not all((folder / "config.json").is_file() for folder in folders):
        return
    ours, theirs = ({n: t for group in read_weights(folder) for n, t in group.items()} for folder in folders)
    if ours.keys() != theirs.keys():
        raise CheckpointError(f"{folders[0]} and {folders[1]} are of different models")
    apart = {name: (ours[name].double() - theirs[name].double()).abs().max().item() for name in ours}
    found.weights_name, found.weights = max(apart.items(), key=lambda item: item[1])
