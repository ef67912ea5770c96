"""Rows of prompt files: JSONL, Parquet, and data sets read by the `datasets` library.

A path is a `.jsonl` or `.parquet` file or `hub:name[:config][:split]`, each with an optional suffix `@[start:end]`
that takes those rows, counted like a Python slice. Rows keep the number they have in the whole file, so that ids
are stable under slicing and skipping.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from array import array
from pathlib import Path
from typing import Any

from miles.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d+)?:(?P<end>-?\d+)?\]", re.DOTALL)


class Rows(ABC):
    """Rows that are read one at a time. `numbers[i]` is the place of row `i` in the whole file."""

    nullable = False
    """The format fills absent fields of a struct with null."""
    uniform = False
    """Every row has the same columns, of the same types."""

    def __init__(self, origin: str):
        self.origin = origin
        self.numbers = range(0)

    def __len__(self) -> int:
        return len(self.numbers)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """Where a row comes from, for error messages."""


class JsonlRows(Rows):
    """One JSON object a line; blank lines are no rows. Holds where lines start, not what they say."""

    def __init__(self, path: Path, rows: slice):
        super().__init__(str(path))
        self._starts = array("q")
        self._lines = array("q")
        self._file = path.open("rb")
        position = 0
        for line_number, line in enumerate(self._file, start=1):
            if line.strip():
                self._starts.append(position)
                self._lines.append(line_number)
            position += len(line)
        self.numbers = range(len(self._starts))[rows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[self.numbers[index]])
        try:
            row = json.loads(self._file.readline())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: expected a JSON object, found {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self.origin}, line {self._lines[self.numbers[index]]}"


class TableRows(Rows):
    """Anything of random access by row: a Parquet table, a data set of the `datasets` library."""

    nullable = True
    uniform = True

    def __init__(self, origin: str, table: Any, count: int, rows: slice):
        super().__init__(origin)
        self._table = table
        self.numbers = range(count)[rows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table(self.numbers[index])

    def where(self, index: int) -> str:
        return f"{self.origin}, row {self.numbers[index]}"


def open_rows(path: str) -> Rows:
    """The rows that `path` names (see the module's docstring).

    Raises:
        DataError: no such file, or an unknown format.
    """
    name, rows = split_slice(path)
    if name.startswith("hub:"):
        return _open_hub(name, rows)
    file = Path(name).expanduser()
    if file.suffix not in (*JSONL_SUFFIXES, ".parquet"):
        raise DataError(f"prompt data {name!r}: expected a .jsonl or .parquet file, or hub:owner/name[:config][:split]")
    if not file.is_file():
        raise DataError(f"prompt data {name!r}: no such file (looked for {file.absolute()})")
    return _open_parquet(file, rows) if file.suffix == ".parquet" else JsonlRows(file, rows)


def split_slice(path: str) -> tuple[str, slice]:
    """`file.jsonl@[10:-5]` -> `("file.jsonl", slice(10, -5))`; without a suffix, all rows."""
    match = _SLICE.fullmatch(path)
    if match is None:
        if "@[" in path:
            raise DataError(f"prompt data {path!r}: a row range is written @[start:end], both optional integers")
        return path, slice(None)
    bounds = [int(text) if text else None for text in match.group("start", "end")]
    return match["path"], slice(*bounds)


def _open_parquet(path: Path, rows: slice) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return TableRows(str(path), lambda i: table.slice(i, 1).to_pylist()[0], len(table), rows)


def _open_hub(name: str, rows: slice) -> Rows:
    """A data set by name (or local folder) through the `datasets` library; split `train` when none is given."""
    source, *rest = name.removeprefix("hub:").split(":")
    if not source or len(rest) > 2:
        raise DataError(f"prompt data {name!r}: expected hub:owner/name[:config][:split]")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: reading a hub data set needs the datasets library: pip install 'miles[hub]'"
        ) from error
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)
            data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            data = datasets.load_dataset(source, config, split=split)
    except Exception as error:
        raise DataError(f"{name}: cannot load split {split!r}: {type(error).__name__}: {error}") from error
    return TableRows(name, data.__getitem__, len(data), rows)
