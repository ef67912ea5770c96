"""The samples of runs, read file by file and written block by block, so that memory does not grow with their number."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from miles.report.blocks import BlockWriter
from miles.report.runs import RunRecord

MAX_SAMPLES = 100_000
MAX_BYTES = 500_000_000
"""Of dumps that go into one page: about a quarter of it is the page's size, and a browser has to hold that."""
CHUNK_SAMPLES, CHUNK_TOKENS = 500, 60_000
FEWEST = 32
"""Rather than fewer samples of every step, steps are left out."""
KNOWN = {
    "id", "group_id", "rollout_id", "prompt_id", "task_set", "prompt", "response", "label", "status", "reward",
    "reward_parts", "loss", "error", "tokens", "prompt_length", "turns",
}  # fmt: skip
"""Everything else in a record that is as long as its tokens is a column of numbers."""


@dataclass(frozen=True)
class Selection:
    """Which samples go into a report."""

    samples: int = MAX_SAMPLES
    """At most so many, over all runs."""
    steps: tuple[int, int] | None = None
    """First and last step, both included; None for all."""
    max_bytes: int = MAX_BYTES


@dataclass
class Sizes:
    """How many samples the dumps of a run hold, and how many of each are taken."""

    taken: list[tuple[int, Path, int]] = field(default_factory=list)
    """Step, file, samples."""
    samples: int = 0
    """In all files that the selection asks for."""
    why_none: str = ""
    """Where nothing is taken."""

    @property
    def left_out(self) -> int:
        return self.samples - sum(count for *_, count in self.taken)


def choose(run: RunRecord, selection: Selection, runs: int) -> Sizes:
    """Share what one of `runs` runs may show among its steps: everything if it fits, else the first of each step."""
    low, high = selection.steps or (0, 10**12)
    if selection.steps and run.dumps and not any(low <= step <= high for step, _ in run.dumps):
        asked = f"step {low}" if low == high else f"steps {low} to {high}"
        why = f"there are samples of {_spelled([step for step, _ in run.dumps])} and none of {asked} (--steps)"
        run.notes.append(why)
        return Sizes(why_none=why)
    files = [(step, path) for step, path in run.dumps if low <= step <= high]
    counts = [_count_lines(path) for _, path in files]
    total, size = sum(counts), sum(path.stat().st_size for _, path in files)
    room = selection.samples // runs
    if size * runs > selection.max_bytes:
        room = min(room, int(total * selection.max_bytes / runs / size))
    every = max(1, len(files) * FEWEST // max(room, 1)) if total > room else 1
    files, counts = files[::every], counts[::every]
    quota = _quota(counts, room)
    taken = [(step, path, min(n, quota)) for (step, path), n in zip(files, counts, strict=True) if min(n, quota)]
    why = "none were kept (--dump-samples 0), or no step was finished" if not total else f"{total:,} are left out"
    return Sizes(taken, total, "" if taken else why)


def _spelled(steps: Sequence[int]) -> str:
    """The extent of a sorted list of steps in words."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    between = f"{steps[0]} to {steps[-1]}"
    return f"steps {between}" if len(steps) > steps[-1] - steps[0] else f"{len(steps)} steps out of {between}"


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def _quota(counts: Sequence[int], room: int) -> int:
    """The largest number of each that fits into `room` in all."""
    for index, count in enumerate(sorted(counts)):
        share = room // (len(counts) - index)
        if count > share:
            return share
        room -= count
    return max(counts, default=0)


class SampleWriter:
    """Takes records, writes `texts-I` and `tokens-I` blocks of a few hundred samples, and at the end `index`."""

    def __init__(self, blocks: BlockWriter, runs: int):
        self.blocks = blocks
        self.numbers = {
            name: array("q") for name in ("run", "step", "id", "group", "set", "status", "prompt", "tokens")
        }
        self.values: dict[str, list[float | None]] = {"reward": [], "loss": [], "advantage": []}
        self.previews: tuple[list[str], list[str]] = ([], [])
        self.names: dict[str, dict[str, int]] = {"set": {}, "status": {}}
        self.extents: dict[str, float] = {}
        """Column -> largest size of a value."""
        self.starts: list[int] = []
        self.used: list[set[int]] = [set() for _ in range(runs)]
        """Token ids that occur, run by run."""
        self._begin()

    def _begin(self) -> None:
        self.starts.append(len(self))
        self.prompts: dict[str, int] = {}
        self.texts: list[dict[str, Any]] = []
        self.pieces: list[dict[str, np.ndarray]] = []
        self.waiting = 0

    def __len__(self) -> int:
        return len(self.numbers["id"])

    def add(self, record: dict[str, Any], run: int, step: int) -> None:
        tokens = np.asarray(record.get("tokens") or [], dtype=np.float64)
        prompt_length = int(record.get("prompt_length") or 0)
        facts = (
            run, step, record.get("id", -1), record.get("group_id", -1), self._name("set", record.get("task_set")),
            self._name("status", record.get("status")), prompt_length, len(tokens),
        )  # fmt: skip
        for column, value in zip(self.numbers.values(), facts, strict=True):
            column.append(int(value))
        columns = _columns(record, len(tokens))
        self.values["reward"].append(record.get("reward"))
        self.values["loss"].append(record.get("loss"))
        self.values["advantage"].append(_mean_advantage(columns))
        prompt = record.get("prompt") or ""
        self.previews[0].append(_preview(_last_words(prompt), from_end=True))
        self.previews[1].append(_preview(str(record.get("response") or "")))
        text: dict[str, Any] = {"prompt": self.prompts.setdefault(json.dumps(prompt), len(self.prompts))}
        text |= {key: record.get(key) for key in ("response", "label", "error", "reward_parts", "turns", "prompt_id")}
        self.texts.append(text)
        self.pieces.append({"tokens": tokens, **columns})
        self.used[run].update(np.unique(tokens).astype(int).tolist())
        self.waiting += len(tokens)
        if len(self.texts) >= CHUNK_SAMPLES or self.waiting >= CHUNK_TOKENS:
            self._flush()

    def _name(self, kind: str, name: Any) -> int:
        known = self.names[kind]
        return known.setdefault(str(name), len(known))

    def _flush(self) -> None:
        if not self.texts:
            return
        number = len(self.starts) - 1
        prompts = [json.loads(prompt) for prompt in self.prompts]
        self.blocks.json(f"texts-{number}", {"prompts": prompts, "samples": self.texts})
        columns = {}
        for name in dict.fromkeys(name for piece in self.pieces for name in piece):
            values = [piece.get(name, np.full(len(piece["tokens"]), np.nan)) for piece in self.pieces]
            columns[name] = (np.concatenate(values), scale_of(name))
            largest = np.nanmax(np.abs(columns[name][0]), initial=0.0)
            self.extents[name] = max(self.extents.get(name, 0.0), float(largest))
        self.blocks.columns(f"tokens-{number}", columns)
        self._begin()

    def finish(self) -> None:
        """Write what is left, and the index that lists, filters and sorts work on."""
        self._flush()
        self.blocks.json(
            "index",
            {
                "count": len(self),
                "numbers": {name: column.tolist() for name, column in self.numbers.items()},
                "values": self.values,
                "previews": self.previews,
                "sets": list(self.names["set"]),
                "statuses": list(self.names["status"]),
                "extents": self.extents,
                "starts": self.starts[:-1],
            },
        )


def scale_of(name: str) -> float:
    """What a column is rounded to: whole tokens, thousandths of a log-probability, else five digits."""
    return 1.0 if name == "tokens" else 1e-3 if name.endswith("log_probs") else 1e-4


def _columns(record: dict[str, Any], length: int) -> dict[str, np.ndarray]:
    """Per-token numbers of a sample. Log-probabilities of tokens that no model of ours produced are none."""
    found = {}
    for name, values in record.items():
        if name not in KNOWN and isinstance(values, list) and len(values) == length and length:
            try:
                found[name] = np.array(values, dtype=np.float64)
            except (TypeError, ValueError):
                continue
    if "weight_version" in found and "rollout_log_probs" in found:
        found["rollout_log_probs"][found["weight_version"] < 0] = np.nan
    return found


def _mean_advantage(columns: dict[str, np.ndarray]) -> float | None:
    """Over the tokens that were learned from."""
    advantages_T, mask_T = columns.get("advantages"), columns.get("loss_mask")
    if advantages_T is None or mask_T is None or not mask_T.any():
        return None
    mean = float(advantages_T[mask_T > 0].mean())
    return round(mean, 5) if math.isfinite(mean) else None


def read_samples(path: Path, limit: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The first `limit` records of a dump; what is no record is a note. NaN reads as None."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                record = json.loads(line, parse_constant=lambda _: None)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                notes.append(f"line {number} of {path.name} is no sample and is left out")


def _last_words(prompt: Any) -> str:
    """Of a chat, what the user said last."""
    if isinstance(prompt, str):
        return prompt
    said = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
    return str(said[-1]) if said else json.dumps(prompt, ensure_ascii=False)


def _preview(text: str, from_end: bool = False, width: int = 90) -> str:
    """One line of about `width` characters: the beginning, or the end."""
    near = text[-4 * width :] if from_end else text[: 4 * width]
    line = " ".join(near.split())
    return line[-width:] if from_end else line[:width]
