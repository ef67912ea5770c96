"""Groups of samples in a file, exactly: to go on with them in another process, or to train on them again.

A file is a zip archive of numpy arrays, such as `numpy.load` reads, and of one `header.json`. What every token has
(token ids, columns) lies end to end, one array for all samples, and the header says how many rows are whose. Everything
else is in the header, by the names of the fields in `miles.types`. Nothing is pickled, compressed or rounded. Objects
that are one stay one: siblings share their prompt, and a processor's tensors, before and after.
"""

from __future__ import annotations

import json
import lzma
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from miles.durable import fresh_file
from miles.errors import DataError
from miles.rollout.values import Packer, Unpacker, check_dtype
from miles.types import Column, Group, Prompt, Sample, Status, Turn

FORMAT = "miles groups 1"
HEADER = "header.json"
TOKENS, PROMPT_TOKENS = "tokens", "prompt_tokens"
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    RuntimeError, OverflowError, MemoryError,
)  # fmt: skip
"""What a reader may come upon in a file that is cut off or altered."""


# ------------------------------------------------------------------------------------------------------------- writing


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """Write groups, durably and whole: `path` holds what it held before until all of it is on the disk.

    Raises:
        DataError: something in a prompt or a sample cannot be written down; the message names the sample and the key.
        OSError: the disk is full or not writable.
    """
    table = _Table()
    header: dict[str, Any] = {"format": FORMAT}
    header["groups"] = [table.group(group) for group in groups]
    header |= {"prompts": table.prompts, "samples": table.samples, "specs": [vars(spec) for spec in table.specs]}
    with fresh_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with _member(archive, HEADER) as member:
            member.write(json.dumps(header, separators=(",", ":")).encode())
        for name, pieces in table.rows.items():
            _write_array(archive, name, pieces)
        for number, array in enumerate(table.packer.arrays):
            _write_array(archive, f"values/{number}", [array])


@dataclass
class _Table:
    """What was met on the way through the groups. An object that is met again is named by its place."""

    packer: Packer = field(default_factory=Packer)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    specs: dict[Column, int] = field(default_factory=dict)
    rows: dict[str, list[np.ndarray]] = field(default_factory=lambda: {TOKENS: [], PROMPT_TOKENS: []})
    """Array -> its pieces in the order of samples (prompts)."""
    columns: dict[tuple, str] = field(default_factory=dict)
    """Name, dtype and width of a column -> the array that holds it."""
    places: dict[int, int] = field(default_factory=dict)
    """id of a prompt or sample -> where it stands in its list."""

    def group(self, group: Group) -> dict[str, Any]:
        baseline = None if group.baseline is None else self.sample(group.baseline)
        samples = [self.sample(sample) for sample in group.samples]
        rest = self._fields(group, f"group {group.id}", without={"prompt", "samples", "baseline"})
        return {**rest, "prompt": self.prompt(group.prompt), "samples": samples, "baseline": baseline}

    def prompt(self, prompt: Prompt) -> int:
        if id(prompt) not in self.places:
            record = self._fields(prompt, f"prompt {prompt.id}", without={"tokens"})
            record["tokens"] = None if prompt.tokens is None else self._tokens(PROMPT_TOKENS, prompt.tokens)
            self.places[id(prompt)] = len(self.prompts)
            self.prompts.append(record)
        return self.places[id(prompt)]

    def sample(self, sample: Sample) -> int:
        if id(sample) not in self.places:
            where = f"sample {sample.id} of prompt {sample.prompt.id}"
            record = self._fields(sample, where, without={"prompt", "tokens", "columns", "specs", "turns"})
            record["prompt"] = self.prompt(sample.prompt)
            record["tokens"] = self._tokens(TOKENS, sample.tokens)
            record["specs"] = [self.specs.setdefault(spec, len(self.specs)) for spec in sample.specs.values()]
            record["columns"] = {name: self._column(name, rows, where) for name, rows in sample.columns.items()}
            record["turns"] = [self._fields(turn, f"{where}: turn {i}") for i, turn in enumerate(sample.turns)]
            self.places[id(sample)] = len(self.samples)
            self.samples.append(record)
        return self.places[id(sample)]

    def _fields(self, thing: Any, where: str, without: Collection[str] = ()) -> dict[str, Any]:
        names = [f.name for f in fields(thing) if f.init and f.name not in without]
        return {name: self.packer.pack(getattr(thing, name), f"{where}: {name}") for name in names}

    def _tokens(self, name: str, tokens: Sequence[int]) -> int:
        self.rows[name].append(np.asarray(tokens, np.int32))
        return len(tokens)

    def _column(self, name: str, rows: np.ndarray, where: str) -> list[Any]:
        """The array that it is in, and its number of rows."""
        check_dtype(rows.dtype, f"{where}: column {name!r}")
        array = self.columns.setdefault((name, rows.dtype, rows.shape[1:]), f"columns/{len(self.columns)}")
        self.rows.setdefault(array, []).append(rows)
        return [array, len(rows)]


def _write_array(archive: zipfile.ZipFile, name: str, pieces: Sequence[np.ndarray]) -> None:
    """Arrays that differ in their number of rows alone, end to end, without a second copy in memory."""
    first = pieces[0] if pieces else np.empty(0, np.int32)
    shape = (sum(map(len, pieces)), *first.shape[1:]) if first.ndim else ()
    descr = np.lib.format.dtype_to_descr(first.dtype)
    with _member(archive, f"{name}.npy") as member:
        np.lib.format.write_array_header_2_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        for piece in pieces:
            flat = np.ascontiguousarray(piece).reshape(-1)
            member.write(flat.view(np.uint8).data if flat.size else b"")


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """Without the time of day: equal groups make equal files."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


# ------------------------------------------------------------------------------------------------------------- reading


def read_groups(path: Path) -> list[Group]:
    """Read what `write_groups` wrote.

    Raises:
        DataError: there is no such file, it is damaged, or of another version of miles.
    """
    try:
        with path.open("rb") as file:
            return list(_read(file, path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or no file of samples: {type(error).__name__}: {error}") from error


def _read(file: BinaryIO, path: Path) -> Iterator[Group]:
    with zipfile.ZipFile(file) as archive:
        header = json.loads(archive.read(HEADER))
        if header["format"] != FORMAT:
            raise DataError(f"{path} is of another version of miles: it is {header['format']!r}, not {FORMAT!r}")
        for kind, records in ((Group, "groups"), (Prompt, "prompts"), (Sample, "samples")):
            known = {f.name for f in fields(kind) if f.init}
            if unknown := {name for record in header[records] for name in record} - known:
                raise DataError(
                    f"{path} is of a newer version of miles: {kind.__name__} has {', '.join(sorted(unknown))}"
                )
        unpacker = Unpacker(lambda number: _read_array(archive, f"values/{number}"))
        rows = {name: _Rows(_read_array(archive, name)) for name in _arrays(header)}
        prompts = [_prompt(unpacker.unpack(record), rows) for record in header["prompts"]]
        specs = [Column(**{**spec, "width": tuple(spec["width"])}) for spec in header["specs"]]
        samples = [_sample(record, unpacker, prompts, specs, rows) for record in header["samples"]]
        if any(rest.left for rest in rows.values()):
            raise ValueError("there are more rows than its header tells of")
        for record in header["groups"]:
            baseline = record.pop("baseline")
            yield Group(
                prompt=prompts[record.pop("prompt")],
                samples=[samples[place] for place in record.pop("samples")],
                baseline=None if baseline is None else samples[baseline],
                **unpacker.unpack(record),
            )


def _arrays(header: dict[str, Any]) -> list[str]:
    columns = {array for record in header["samples"] for array, _ in record["columns"].values()}
    return [TOKENS, PROMPT_TOKENS, *sorted(columns)]


class _Rows:
    """An array that is handed out piece by piece."""

    def __init__(self, array: np.ndarray):
        self.array, self.start = array, 0

    def take(self, count: int) -> np.ndarray:
        """A copy: one sample that is kept shall not keep a whole batch."""
        if not 0 <= count <= self.left:
            raise ValueError(f"{count} rows are expected where {self.left} are left")
        self.start += count
        return self.array[self.start - count : self.start].copy()

    @property
    def left(self) -> int:
        return len(self.array) - self.start


def _prompt(record: dict[str, Any], rows: dict[str, _Rows]) -> Prompt:
    if record["tokens"] is not None:
        record["tokens"] = rows[PROMPT_TOKENS].take(record["tokens"]).tolist()
    return Prompt(**record)


def _sample(
    record: dict[str, Any], unpacker: Unpacker, prompts: list[Prompt], specs: list[Column], rows: dict[str, _Rows]
) -> Sample:
    columns = {name: rows[array].take(count) for name, (array, count) in record.pop("columns").items()}
    chosen = [specs[place] for place in record.pop("specs")]
    record["prompt"] = prompts[record["prompt"]]
    rest = {name: value if name == "prompt" else unpacker.unpack(value) for name, value in record.items()}
    rest["status"] = Status(rest["status"])
    rest["turns"] = [Turn(**turn) for turn in rest["turns"]]
    rest["tokens"] = rows[TOKENS].take(rest["tokens"]).tolist()
    return Sample(**rest, columns=columns, specs={spec.name: spec for spec in chosen})


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)
