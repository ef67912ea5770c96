"""A corpus on disk: one JSON object a line, read where it lies.

Passages are `{"id": ..., "contents": "title\\ntext"}` or `{"title": ..., "text": ...}`. In memory are only the places
where lines begin, 8 bytes a passage: 21 million passages of Wikipedia (14 GB) need no more than the page cache.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from miles.api import DataError

SAMPLED = 256
"""Blocks of a large file that its fingerprint looks at."""
BLOCK = 16 * 1024


class Corpus:
    """Passages by number.

    Args:
        offsets: where lines begin, and the end of the file: `[passages + 1]`, int64.
    """

    def __init__(self, path: Path, offsets: np.ndarray):
        self.path, self.offsets = path, offsets
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The row of a passage.

        Raises:
            DataError: the line is no JSON object.
        """
        line = self._bytes[int(self.offsets[number]) : int(self.offsets[number + 1])]
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: passage {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.path}: passage {number} is no JSON object: {line[:80]!r}")
        return row

    def text(self, number: int) -> str:
        """What of a passage is embedded: `contents`, or title and text.

        Raises:
            DataError: it has neither.
        """
        row = self[number]
        if isinstance(row.get("contents"), str):
            return row["contents"]
        if isinstance(row.get("text"), str):
            return f"{row.get('title') or ''}\n{row['text']}".strip()
        keys = ", ".join(row) or "no keys"
        raise DataError(f"{self.path}: passage {number} has {keys}; `contents`, or `title` and `text`, is expected")

    def batches(self, size: int) -> Iterator[list[str]]:
        """The texts of all passages in order."""
        for start in range(0, len(self), size):
            yield [self.text(number) for number in range(start, min(start + size, len(self)))]


def open_corpus(path: Path) -> Corpus:
    """A corpus, with its lines found.

    Raises:
        DataError: there is no such file, or it has no passage.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; a corpus is a JSONL file of passages")
    offsets, place = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(place)
            place += len(line)
    if not offsets:
        raise DataError(f"{path}: there is no passage in it")
    offsets.append(place)
    return Corpus(path, np.array(offsets))


def fingerprint(path: Path) -> str:
    """What tells a file from others: its size and its contents; of a large file, blocks that are spread over it."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLED * BLOCK:
            digest.update(file.read())
        else:
            for place in np.linspace(0, size - BLOCK, SAMPLED).astype("int64").tolist():
                file.seek(place)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
