"""Attention of one new token a sequence over its own keys, and no others: what decoding spends most of its time on.

torch's fused kernels attend to slots that are all of one length: they read what lies behind the end of the shorter
sequences, and a CUDA graph reads as far as the longest one that it may be replayed for. Here each sequence is read to
its own end. Keys are taken `SPLIT` at a time by programs of their own, whose results a second kernel puts together;
the cuts do not depend on the other sequences, and so the result does not either.

Shapes as in `attention`: `[B, N, D]` queries, `[B, N_kv, M, D]` keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 512
"""Keys of one program."""
BLOCK = 64
"""Keys it looks at together."""


def attend(q: Tensor, k: Tensor, v: Tensor, positions_B: Tensor, window: int | None) -> Tensor:
    """What the queries at `positions_B` see of keys up to and with their own position, `[B, N, D]`.

    Args:
        k, v: slices of the cache, contiguous in the last dimension and laid out alike; `M` bounds all positions.
        window: keys a query sees at most, its own included; None for all.
    """
    count, heads, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    splits = triton.cdiv(keys, SPLIT)
    q = q.contiguous()
    partial = torch.empty(count, heads, splits, width, device=q.device, dtype=torch.float32)
    log_mass = torch.empty(count, heads, splits, device=q.device, dtype=torch.float32)
    group = heads // kv_heads
    _attend_split[(count, kv_heads, splits)](
        q, k, v, positions_B, partial, log_mass, k.stride(0), k.stride(1), splits, window or 0, width**-0.5,
        group, max(triton.next_power_of_2(group), 16), width, SPLIT, BLOCK,
        "ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    out = torch.empty_like(q)
    _join_splits[(count, heads)](partial, log_mass, out, splits, triton.next_power_of_2(splits), width)
    return out


def fits(width: int, group: int) -> bool:
    """Whether heads of this size, so many to a key head, are served."""
    return 16 <= width <= 256 and width & (width - 1) == 0 and group <= 64


@triton.jit
def _attend_split(
    q_ptr, k_ptr, v_ptr, position_ptr, partial_ptr, mass_ptr, slot_stride, head_stride, splits, window, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, one key head and the query heads that share it, one stretch of keys."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position_ptr + sequence) + 1
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    start = tl.maximum(split * SPLIT, (first // BLOCK) * BLOCK)
    end = tl.minimum((split + 1) * SPLIT, length)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    heads = tl.num_programs(1) * GROUP
    query = sequence * heads + head * GROUP + rows
    real = rows < GROUP
    q = tl.load(q_ptr + query[:, None] * WIDTH + columns[None, :], mask=real[:, None], other=0.0)
    base = sequence.to(tl.int64) * slot_stride + head * head_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, WIDTH], tl.float32)
    for key in range(start, end, BLOCK):
        keys = key + tl.arange(0, BLOCK)
        seen = (keys < end) & (keys >= first)
        place = base + keys[:, None] * WIDTH + columns[None, :]
        k = tl.load(k_ptr + place, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        known = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - known[:, None])
        shrink = tl.exp(top - known)
        v = tl.load(v_ptr + place, mask=seen[:, None], other=0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        sum_ = sum_ * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    target = query * splits + split
    found = mass > 0
    tl.store(mass_ptr + target, tl.where(found, top + tl.log(tl.where(found, mass, 1.0)), float("-inf")), mask=real)
    mean = sum_ / tl.where(found, mass, 1.0)[:, None]
    tl.store(partial_ptr + target[:, None] * WIDTH + columns[None, :], mean, mask=real[:, None])


@triton.jit
def _join_splits(partial_ptr, mass_ptr, out_ptr, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The stretches of one query, each weighted by its mass."""
    query = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    parts = tl.arange(0, SPLITS)
    columns = tl.arange(0, WIDTH)
    log_mass = tl.load(mass_ptr + query * splits + parts, mask=parts < splits, other=float("-inf"))
    weights = tl.exp(log_mass - tl.max(log_mass, 0))
    place = (query * splits + parts)[:, None] * WIDTH + columns[None, :]
    means = tl.load(partial_ptr + place, mask=(parts < splits)[:, None], other=0.0)
    out = tl.sum(weights[:, None] * means, 0) / tl.sum(weights, 0)
    tl.store(out_ptr + query * WIDTH + columns, out.to(out_ptr.dtype.element_ty))
