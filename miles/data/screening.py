"""Which rows of a task set are prompts: better an error before a run than in the middle of one."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from miles.config import TaskSet
from miles.data.prompts import read_prompt
from miles.data.readers import Rows, open_rows
from miles.errors import DataError
from miles.types import Prompt


@dataclass
class Screened:
    """The rows of a set, and which of them can be used."""

    task_set: TaskSet
    rows: Rows
    usable: Sequence[int]
    """Indices of well-formed rows among those that were looked at."""
    looked_at: int
    malformed: int = 0

    def read(self, index: int) -> Prompt:
        """Raises DataError with file and line."""
        where, number = self.rows.where(index), self.rows.numbers[index]
        return read_prompt(self.rows[index], self.task_set, number, where, self.rows.nullable)


def screen(task_set: TaskSet, skip: bool, most: int | None = None) -> Screened:
    """Open a set's file and read its rows, all of them or the first `most`.

    Where all rows have the same columns and types, one stands for all; the rest are checked when drawn.

    Args:
        skip: count malformed rows instead of stopping at the first.

    Raises:
        DataError: there is no file, a row is malformed, or none is usable.
    """
    if task_set.path is None:
        raise DataError(f"task set {task_set.name!r} has no path; give one with --prompt-data FILE or in data.sets")
    rows = open_rows(task_set.path)
    count = len(rows) if most is None else min(most, len(rows))
    if rows.uniform:
        found = Screened(task_set, rows, range(len(rows)), min(1, len(rows)))
        if len(rows):
            found.read(0)
    else:
        found = _read_each(Screened(task_set, rows, array("q"), count), skip)
    if not found.usable and count == len(rows):
        raise DataError(f"task set {task_set.name!r}: {task_set.path} has no usable row ({found.malformed} malformed)")
    return found


def _read_each(found: Screened, skip: bool) -> Screened:
    good = array("q")
    for index in range(found.looked_at):
        try:
            found.read(index)
            good.append(index)
        except DataError as error:
            if not skip:
                error.add_note("to skip and count such rows: data.bad_lines=skip (--bad-lines skip)")
                raise
            found.malformed += 1
    found.usable = good
    return found
