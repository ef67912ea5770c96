"""How data lies in the page: compressed blocks in elements that no browser runs, unpacked by `blocks.js` when needed.

A block is gzip in base64, so nothing in it can end its element. It holds JSON, or columns of numbers:

    uint32 little-endian: length of the header | header, JSON | columns

The header says `names`, `scales`, `count`. Each column is `count` int32 (a value divided by its scale, MISSING for
none), taken apart into four runs of bytes, lowest first: most upper bytes are alike, and compress to almost nothing.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

MISSING = -(2**31)
LEVEL = 6


class BlockWriter:
    """Writes blocks to an open page."""

    def __init__(self, page: IO[bytes]):
        self.page = page

    def json(self, name: str, value: Any) -> None:
        self.raw(name, json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())

    def columns(self, name: str, columns: Mapping[str, tuple[np.ndarray, float]]) -> None:
        """`columns`: name -> values (float64, NaN for none; all of one length) and scale."""
        count = len(next(iter(columns.values()))[0])
        scales = [scale for _, scale in columns.values()]
        header = json.dumps({"names": list(columns), "scales": scales, "count": count}).encode()
        pieces = [struct.pack("<I", len(header)), header]
        pieces += [packed(values, scale) for values, scale in columns.values()]
        self.raw(name, b"".join(pieces))

    def raw(self, name: str, content: bytes) -> None:
        encoded = base64.b64encode(gzip.compress(content, LEVEL, mtime=0))
        self.page.write(f'<script type="application/octet-stream" id="block-{name}">'.encode())
        self.page.write(encoded)
        self.page.write(b"</script>\n")


def packed(values: np.ndarray, scale: float) -> bytes:
    """A column as bytes, see above; what int32 cannot hold is cut off at its ends."""
    values = np.asarray(values, dtype=np.float64)
    whole = np.round(np.clip(np.nan_to_num(values, posinf=np.inf, neginf=-np.inf) / scale, MISSING + 1, -(MISSING + 1)))
    whole = np.where(np.isnan(values), MISSING, whole).astype("<i4")
    return whole.view(np.uint8).reshape(-1, 4).T.tobytes()
