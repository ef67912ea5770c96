"""Samples into micro-batches and back: which go together, how they lie end to end, how a batch is halved.

A micro-batch holds whole samples, one after the other, with no padding between them: `T` tokens cost `T` tokens of
work whatever the lengths are. Who reads one finds sample `i` at `[bounds[i], bounds[i + 1])` of every column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.errors import DataError
from miles.types import Column, MicroBatch

Rows = Any
"""The rows of one sample in one column: an array or tensor `[tokens, *width]`, or None where the sample has none."""

# ------------------------------------------------------------------------------------------------------------- plans


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, shared: Sequence[int] = ()) -> list[list[int]]:
    """First-fit decreasing: the longest sample first, each into the first micro-batch that still has room. Where more
    than a tenth of the tokens are shared, samples stay in their order, beside those they share a prompt with.

    Every index appears exactly once; indices ascend within a micro-batch. A sample longer than `max_tokens` gets a
    micro-batch of its own: whether it fits is for the memory to say.
    `shared` is as in `MicroBatch.shared`, of all samples.
    """
    if stay_together(lengths, shared):
        return _in_order(lengths, max_tokens)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    plans = [[index] for index in order if lengths[index] > max_tokens]
    fitting = order[len(plans) :]
    # Room of the micro-batches as a tournament: node n knows the most room below nodes 2n and 2n + 1, so that the
    # first leaf with enough is found by going down. Any two micro-batches together are more than full: so few do.
    most = min(len(fitting), 2 * sum(lengths[index] for index in fitting) // max_tokens + 1)
    size = 1 << max(most - 1, 0).bit_length()
    room = [max_tokens] * (2 * size)
    filled: list[list[int]] = [[] for _ in range(size)]
    for index in fitting:
        length, node = lengths[index], 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        filled[node - size].append(index)
        room[node] -= length
        left = room[node]
        while node > 1 and room[node // 2] > left:
            left = max(left, room[node ^ 1])
            node //= 2
            room[node] = left
    return [sorted(plan) for plan in [*plans, *filled] if plan]


def stay_together(lengths: Sequence[int], shared: Sequence[int]) -> bool:
    """Whether so many tokens are shared that samples stay beside those they share a prompt with."""
    return 10 * sum(shared) > sum(lengths)


def _in_order(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """One micro-batch is filled after the other."""
    plans, room = list[list[int]](), 0
    for index, length in enumerate(lengths):
        if length > room:
            plans.append([])
            room = max_tokens
        plans[-1].append(index)
        room -= length
    return plans


def chunk_micro_batches(count: int, micro_batch_size: int) -> list[list[int]]:
    """`micro_batch_size` samples at a time, in order, whatever their lengths."""
    return [list(range(i, min(i + micro_batch_size, count))) for i in range(0, count, micro_batch_size)]


# ----------------------------------------------------------------------------------------------------------- building


def build_micro_batch(
    rows: Sequence[int],
    tokens: Sequence[Sequence[int] | np.ndarray],
    columns: Mapping[str, Sequence[Rows]],
    *,
    specs: Mapping[str, Column] | None = None,
    scalars: Mapping[str, Tensor] | None = None,
    multimodal: Sequence[dict[str, Any]] | None = None,
    device: str | torch.device = "cpu",
) -> MicroBatch:
    """Lay the samples `rows` of a table end to end.

    Args:
        rows: which samples, in the order they are laid.
        tokens: token ids of every sample of the table.
        columns: name -> one array a sample of the table. A column of offset -1 has one row fewer than tokens; it is
            filled up so that every column has one row a token.
        specs: declarations of columns; needed where a sample has None (its rows become `fill`), and for the last
            row of columns of offset -1 unless their fill is -1.
        scalars: name -> `[table rows]`, one number a sample.
        multimodal: processor outputs of every sample of the table.

    Raises:
        DataError: a sample without tokens, or a column whose rows do not match them.
    """
    lengths = [len(tokens[row]) for row in rows]
    if 0 in lengths:
        raise DataError(f"sample {rows[lengths.index(0)]} of the batch has no tokens; drop it before packing")
    bounds = [0, *accumulate(lengths)]
    ids_T = np.concatenate([np.zeros(0, np.int64), *(np.asarray(tokens[row], dtype=np.int64) for row in rows)])
    positions_T = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    packed = {name: _pack(rows, column, lengths, name, (specs or {}).get(name)) for name, column in columns.items()}
    mask_T = None if any(multimodal or ()) else packed.get("mask")  # equal tokens may stand for other images
    batch = MicroBatch(
        torch.from_numpy(ids_T),
        torch.from_numpy(positions_T),
        bounds,
        list(rows),
        packed,
        {name: values[list(rows)] for name, values in (scalars or {}).items()},
        [multimodal[row] for row in rows] if multimodal else [],
        [] if mask_T is None else shared_prompts(ids_T, mask_T.numpy(), bounds),
    )
    return move_micro_batch(batch, device)


def shared_prompts(ids_T: np.ndarray, mask_T: np.ndarray, bounds: Sequence[int]) -> list[int]:
    """For each sample the length of its prompt, if the sample before it has the same one, else 0. A prompt is what
    comes before the first token that is learned; a sample that learns nothing shares nothing."""
    starts = np.asarray(bounds[:-1], dtype=np.int64)
    learned = np.append(np.flatnonzero(mask_T), len(mask_T))
    firsts = learned[np.searchsorted(learned, starts)]
    prompts = [ids_T[a:b].tobytes() if b < end else b"" for a, b, end in zip(starts, firsts, bounds[1:], strict=True)]
    alike = (prompt == before for before, prompt in pairwise([b"", *prompts]))
    return [len(prompt) // ids_T.itemsize * same for prompt, same in zip(prompts, alike, strict=True)]


def _pack(
    rows: Sequence[int], column: Sequence[Rows], lengths: Sequence[int], name: str, spec: Column | None
) -> Tensor:
    """One column end to end, `[T, *width]`."""
    arrays = [
        one_a_token(column[row], length, name, spec, f"sample {row} of the batch")
        for row, length in zip(rows, lengths, strict=True)
    ]
    if arrays:
        return torch.from_numpy(np.concatenate(arrays))
    return torch.from_numpy(np.zeros((0, *(spec.width if spec else ())), spec.dtype if spec else np.float32))


def one_a_token(piece: Rows, length: int, name: str, spec: Column | None, whose: str) -> np.ndarray:
    """The rows of one sample, filled up: where it has none, and after the last of a column of offset -1, whose rows
    belong to the forward passes before it. `whose` they are, errors say."""
    if piece is None:
        if spec is None:
            raise DataError(f"{whose} has no column {name!r}: give its Column in `specs`, so that it can be filled")
        return spec.filled(length)
    array = piece.detach().cpu().numpy() if isinstance(piece, Tensor) else np.asarray(piece)
    if len(array) == length:
        return array
    offset = spec.offset if spec else -1
    if len(array) != length + offset:
        raise DataError(f"column {name!r} of {whose} has {len(array)} rows, and the sample {length} tokens")
    if spec is None and array.dtype.kind != "i":
        short = f"column {name!r} ({array.dtype}) of {whose} is one row short"
        raise DataError(f"{short}: give its Column in `specs`, with its fill")
    last = np.full((1, *array.shape[1:]), spec.fill if spec else -1, array.dtype)
    return np.concatenate([array, last])


def move_micro_batch(batch: MicroBatch, device: str | torch.device) -> MicroBatch:
    """The same micro-batch with its tensors on `device`."""
    return replace(
        batch,
        tokens_T=batch.tokens_T.to(device),
        positions_T=batch.positions_T.to(device),
        columns={name: column.to(device) for name, column in batch.columns.items()},
        scalars={name: values.to(device) for name, values in batch.scalars.items()},
    )


# --------------------------------------------------------------------------------------------- halving and taking apart


def split_micro_batch(batch: MicroBatch) -> tuple[MicroBatch, MicroBatch]:
    """Two micro-batches of about half the tokens each, samples in the same order.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(batch) < 2:
        raise ValueError(f"a micro-batch of {len(batch)} sample(s) cannot be split")
    cut = min(range(1, len(batch)), key=lambda i: abs(2 * batch.bounds[i] - batch.bounds[-1]))
    return take_samples(batch, 0, cut), take_samples(batch, cut, len(batch))


def take_samples(batch: MicroBatch, first: int, last: int) -> MicroBatch:
    """Samples `first` to `last` (exclusive) as a micro-batch of their own; tensors are views."""
    start, end = batch.bounds[first], batch.bounds[last]
    return MicroBatch(
        batch.tokens_T[start:end],
        batch.positions_T[start:end],
        [bound - start for bound in batch.bounds[first : last + 1]],
        batch.sample_ids[first:last],
        {name: column[start:end] for name, column in batch.columns.items()},
        {name: values[first:last] for name, values in batch.scalars.items()},
        batch.multimodal[first:last],
        [0, *batch.shared[first + 1 : last]] if batch.shared else [],
    )


def split_by_sample(values_T: Tensor, bounds: Sequence[int]) -> list[Tensor]:
    """A packed column as one view a sample; a trailing pad is left out."""
    return [values_T[start:end] for start, end in pairwise(bounds)]
