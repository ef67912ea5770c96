"""Which requests belong on one server, because what they have in common is in its cache."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

REMEMBERED = 2**16
"""Trajectories, the oldest of which are forgotten first."""


class Affinity:
    """Gives requests a key: the samples of a prompt begin alike and get one, and each keeps it through its turns, which
    are requests of the ids `TRAJECTORY.TURN`."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def key(self, id: str, tokens: Sequence[int]) -> str:
        trajectory, dot, _ = id.rpartition(".")
        if dot and trajectory in self._keys:
            return self._keys[trajectory]
        key = f"{zlib.crc32(array('q', tokens)):08x}"
        if dot:
            self._keys[trajectory] = key
            if len(self._keys) > REMEMBERED:
                del self._keys[next(iter(self._keys))]
        return key
