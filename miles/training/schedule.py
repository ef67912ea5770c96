"""Which samples go into which optimizer step, rank and micro-batch: pure functions of lengths and rollout ids."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from miles.errors import ConfigError
from miles.training.packing import chunk_micro_batches, plan_micro_batches, stay_together

Bins = list[list[int]]
"""Rows of each micro-batch."""


def optimizer_steps(rollout_ids: Sequence[int], steps: int, epochs: int = 1) -> list[list[int]]:
    """Rows of each optimizer step, in order.

    Rollouts (siblings of one trajectory stay together) are dealt in the order they first appear, into `steps` parts
    whose sizes differ by at most one: when samples were lost, the steps get a little smaller, not fewer.
    """
    rows_of: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollout_ids):
        rows_of.setdefault(rollout, []).append(row)
    order = list(rows_of)
    parts = np.array_split(np.arange(len(order)), min(steps, max(len(order), 1)))
    once = [[row for i in part for row in rows_of[order[i]]] for part in parts if len(part)]
    return once * epochs


def rank_micro_batches(
    lengths: Sequence[int],
    data_size: int,
    max_tokens: int | None,
    micro_batch_size: int,
    shared: Sequence[int] = (),
    *,
    costs: Sequence[float] | None = None,
    planned_for: int | None = None,
) -> list[Bins]:
    """`[rank][micro-batch][row]`: every rank gets the same number of micro-batches, each row exactly once.

    Ranks work in step, so a plan is as slow as its most loaded rank: with `costs`, micro-batches are made about equally
    costly where there is room for it, and are dealt so that ranks are; a rank does the costliest first, when the others
    do theirs. The costs that meet depend on lengths and costs alone, not on the order of rows.

    Args:
        lengths: tokens of each row.
        max_tokens: cap of a micro-batch, which only a row that is longer exceeds, alone; None to count
            `micro_batch_size` samples instead.
        shared: as in `MicroBatch.shared`, of all rows.
        costs: of each row, in any unit; None to deal micro-batches in turn.
        planned_for: plan for this many shares, a multiple of `data_size`, and give each rank as many, one after the
            other: the micro-batches, and what is in a share, are then the same on any number of ranks.

    Raises:
        ConfigError: `planned_for` shares cannot be divided among the ranks.
    """
    shares = planned_for or data_size
    if shares % data_size:
        raise ConfigError(
            f"train.reproducible_ranks={shares} cannot be divided among {data_size} data ranks: give a multiple of "
            f"them, or train on as many ranks as divide it"
        )
    load = lengths if costs is None else costs
    if max_tokens is None:
        bins = chunk_micro_batches(len(lengths), micro_batch_size)
    else:
        bins = plan_micro_batches(lengths, max_tokens, shared)
    count = -(-len(bins) // shares) * shares
    movable = shares > 1 and costs is not None and max_tokens is not None and not stay_together(lengths, shared)
    spread = _spread(lengths, load, count, max_tokens or 0) if movable else None
    bins = spread or _halved(bins, load, count)
    dealt = (
        [bins[share::shares] for share in range(shares)]
        if costs is None or shares == 1
        else _balanced(bins, load, shares)
    )
    each = shares // data_size
    return [[rows for share in dealt[first : first + each] for rows in share] for first in range(0, shares, each)]


def _spread(lengths: Sequence[int], costs: Sequence[float], count: int, max_tokens: int) -> Bins | None:
    """Rows over `count` micro-batches of about equal cost: the costliest first, each to whom has least. None where they
    do not fit so under the cap."""
    bins: Bins = [[] for _ in range(count)]
    open_bins = [(0.0, number) for number in range(count)]
    tokens = [0] * count
    for row in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        while open_bins and bins[(number := open_bins[0][1])] and tokens[number] + lengths[row] > max_tokens:
            heappop(open_bins)  # full
        if not open_bins:
            return None
        load, number = open_bins[0]
        heapreplace(open_bins, (load + costs[row], number))
        bins[number].append(row)
        tokens[number] += lengths[row]
    return [sorted(rows) for rows in bins]


def _halved(bins: Bins, costs: Sequence[float], count: int) -> Bins:
    """The costliest in halves until there are `count`; with too few samples, some are empty."""
    bins = list(bins)
    loads = [sum(costs[row] for row in rows) if len(rows) > 1 else -1 for rows in bins]
    while len(bins) < count:
        at = loads.index(max(loads)) if loads else 0
        if not loads or len(bins[at]) < 2:
            return bins + [[] for _ in range(count - len(bins))]
        middle = len(bins[at]) // 2
        halves = bins[at][:middle], bins[at][middle:]
        bins[at : at + 1] = halves
        loads[at : at + 1] = [sum(costs[row] for row in rows) if len(rows) > 1 else -1 for rows in halves]
    return bins


def _balanced(bins: Bins, costs: Sequence[float], shares: int) -> list[Bins]:
    """As many micro-batches for each share, so that their costs are about equal; the costliest of a share first.

    Largest differencing (Karmarkar and Karp 1982) for parts of equal counts (Michiels et al. 2003): micro-batches of
    about one cost are dealt one to a share, which leaves a difference between shares; deals are then joined two by two,
    those of the largest difference first, the most loaded share of one with the least loaded of the other.
    """
    loads = [sum(costs[row] for row in rows) for rows in bins]
    order = sorted(range(len(bins)), key=lambda number: (-loads[number], bins[number]))
    deals = []
    for first in range(0, len(order), shares):
        parts = [(loads[number], [number]) for number in order[first : first + shares]]
        deals.append((parts[-1][0] - parts[0][0], first, parts))
    heapify(deals)
    while len(deals) > 1:
        (_, first, one), (_, _, other) = heappop(deals), heappop(deals)
        if len(one[0][1]) < len(other[0][1]):
            one, other = other, one
        joined = []
        for (load, numbers), (more, others) in zip(one, reversed(other), strict=True):
            numbers.extend(others)
            joined.append((load + more, numbers))
        joined.sort(key=lambda part: -part[0])
        heappush(deals, (joined[-1][0] - joined[0][0], first, joined))
    place = {number: at for at, number in enumerate(order)}
    dealt = deals[0][2] if deals else [(0, []) for _ in range(shares)]
    return [[bins[number] for number in sorted(numbers, key=place.__getitem__)] for _, numbers in dealt]
