"""Which samples go into which optimizer step, rank and micro-batch: pure functions of lengths and rollout ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.training.packing import chunk_micro_batches, plan_micro_batches


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
    lengths: Sequence[int], data_size: int, max_tokens: int | None, micro_batch_size: int, shared: Sequence[int] = ()
) -> list[list[list[int]]]:
    """`[rank][micro-batch][row]`: every rank gets the same number of micro-batches, each row exactly once.

    Args:
        lengths: tokens of each row.
        max_tokens: cap of a micro-batch; None to count `micro_batch_size` samples instead.
        shared: as in `MicroBatch.shared`, of all rows.
    """
    if max_tokens is None:
        bins = chunk_micro_batches(len(lengths), micro_batch_size)
    else:
        bins = plan_micro_batches(lengths, max_tokens, shared)
    bins = _even(bins, data_size)
    return [bins[rank::data_size] for rank in range(data_size)]


def _even(bins: list[list[int]], multiple: int) -> list[list[int]]:
    """Split the fullest bins until their number is a multiple; with too few samples, a rank gets an empty bin."""
    bins = list(bins)
    while len(bins) % multiple:
        fullest = max(range(len(bins)), key=lambda i: len(bins[i]))
        if len(bins[fullest]) < 2:
            bins.append([])
            continue
        whole = bins.pop(fullest)
        bins[fullest:fullest] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return bins
