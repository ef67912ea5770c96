"""Groups of weights as buckets: one run of bytes for many tensors, and the names, dtypes and shapes that go with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from miles.types import WeightGroup

ALIGNMENT = 16
"""Bytes: each tensor starts at a multiple, so that its part of a bucket can be viewed as any dtype."""


class Entry(NamedTuple):
    """One tensor of a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Bucket:
    """Valid until the bucket after the next is made: the next one is filled while this one is on its way."""

    bytes: Tensor
    """`[size]` uint8."""
    groups: Sequence[Sequence[Entry]]
    """In the order of their bytes."""


def pack(groups: Iterable[WeightGroup], limit: int, device: str | None = None) -> Iterator[Bucket]:
    """Buckets of at most `limit` bytes, on `device` or where the weights are. A group is never divided: a larger one
    has a bucket to itself.

    Two runs of `limit` bytes are allocated, and take turns.
    """
    runs = itertools.cycle((_Run(limit, device), _Run(limit, device)))
    run = next(runs)
    for group in groups:
        size = sum(_padded(tensor.nbytes) for tensor in group.values())
        if run.groups and run.used + size > limit:
            yield run.bucket()
            run = next(runs)
            run.used, run.groups = 0, []
        run.add(group, size)
    if run.groups:
        yield run.bucket()


def unpack(run: Tensor, groups: Iterable[Iterable[Sequence]]) -> Iterator[WeightGroup]:
    """The groups of a bucket, as views of its bytes."""
    for group in places(groups):
        yield {entry.name: run[place].view(_dtype(entry)).view(entry.shape) for entry, place in group}


def places(groups: Iterable[Iterable[Sequence]]) -> Iterator[list[tuple[Entry, slice]]]:
    """Of each group: its tensors, and where in the bucket their bytes are."""
    start = 0
    for entries in groups:
        group = []
        for name, dtype, shape in entries:
            entry = Entry(name, dtype, tuple(shape))
            size = math.prod(entry.shape) * _dtype(entry).itemsize
            group.append((entry, slice(start, start + size)))
            start += _padded(size)
        yield group


@dataclass
class _Run:
    limit: int
    device: str | None
    storage: Tensor | None = None
    used: int = 0
    groups: list[list[Entry]] = field(default_factory=list)

    def add(self, group: WeightGroup, size: int) -> None:
        if self.storage is None or len(self.storage) < self.used + size:
            device = self.device or next(iter(group.values())).device
            self.storage = torch.empty(max(self.limit, size), dtype=torch.uint8, device=device)
        self.groups.append(
            [Entry(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in group.items()]
        )
        views = unpack(self.storage[self.used :], [self.groups[-1]])
        for view, tensor in zip(next(views).values(), group.values(), strict=True):
            view.copy_(tensor.detach())
        self.used += size

    def bucket(self) -> Bucket:
        assert self.storage is not None
        return Bucket(self.storage[: self.used], self.groups)


def _dtype(entry: Entry) -> torch.dtype:
    return getattr(torch, entry.dtype)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
