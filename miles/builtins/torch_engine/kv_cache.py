"""Keys and values of running sequences: one block of memory, cut into slots of equal length.

Running sequences occupy the first slots without gaps, so that a decoding step reads plain slices. A sequence that ends
is replaced by the one in the last slot (`move`). Prefixes worth keeping are copied out as `Segment`s (`read`) and back
in when a request extends them (`write`).

Dimensions: `_L` layers, `_S` slots, `_N` key-value heads, `_M` tokens a slot holds, `_D` head, `_T` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.api import routed_experts_column
from miles.builtins.torch_engine.decoder import DecoderConfig


@dataclass(frozen=True)
class Segment:
    """What some consecutive tokens of a sequence left behind."""

    kv: Tensor
    """`[L, 2, N, T, D]`: keys, then values."""
    experts: Tensor | None
    """`[T, L, K]`, for a mixture of experts: what a request that finds this prefix is told of it."""

    def cut(self, start: int, end: int) -> Segment:
        """A part of it, as a copy that does not keep the rest alive."""
        experts = self.experts[start:end].clone() if self.experts is not None else None
        return Segment(self.kv[..., start:end, :].clone(), experts)


class Memory:
    """What a cache is cut from. It outlives the cut, so another one starts without asking for memory again."""

    def __init__(self, config: DecoderConfig, tokens: int, device: torch.device, dtype: torch.dtype):
        self.config, self.tokens = config, tokens
        # Zeros, since a masked position still multiplies a value: what was never written must be finite.
        self.kv = _zeros(tokens * config.num_layers * 2 * config.num_kv_heads * config.head_dim, device, dtype)
        column = routed_experts_column(config.num_layers, config.top_k_experts, config.num_experts)
        choices = config.num_layers * config.top_k_experts if config.routes else 0
        self.experts = torch.zeros(tokens * choices, device=device, dtype=getattr(torch, column.dtype))


def _zeros(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU the system's lazy zeros: pages that nobody writes cost nothing."""
    if device.type != "cpu":
        return torch.zeros(count, device=device, dtype=dtype)
    size = count * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size]).view(dtype)


class KVCache:
    def __init__(self, memory: Memory, slots: int, length: int, exact: bool = False):
        """`exact` says how what it holds is attended to."""
        config = memory.config
        shape = (config.num_layers, 2, slots, config.num_kv_heads, length, config.head_dim)
        self.kv = memory.kv[: math.prod(shape)].view(shape)
        self.experts_SMLK: Tensor | None = None
        if config.routes:
            chosen = (slots, length, config.num_layers, config.top_k_experts)
            self.experts_SMLK = memory.experts[: math.prod(chosen)].view(chosen)
        self.slots, self.length, self.exact, self.heads = slots, length, exact, config.num_kv_heads
        self.keys = [layer[0].view(-1, config.head_dim) for layer in self.kv]
        self.values = [layer[1].view(-1, config.head_dim) for layer in self.kv]
        self._head_offsets_N = torch.arange(self.heads, device=self.kv.device) * length

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    def rows(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Rows of `keys` and `values` that hold these tokens, `[T * N]`."""
        first_T = slots_T * (self.heads * self.length) + positions_T
        return (first_T.unsqueeze(1) + self._head_offsets_N).flatten()

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one slot into another."""
        self.kv[:, :, target, :, :tokens] = self.kv[:, :, source, :, :tokens]
        if self.experts_SMLK is not None:
            self.experts_SMLK[target, :tokens] = self.experts_SMLK[source, :tokens]

    def clear(self, slot: int) -> None:
        """Wipe a slot in which something is not finite."""
        self.kv[:, :, slot].zero_()

    def read(self, slot: int, start: int, end: int) -> Segment:
        """A copy of what a stretch of a slot holds."""
        experts = self.experts_SMLK[slot, start:end].clone() if self.experts_SMLK is not None else None
        return Segment(self.kv[:, :, slot, :, start:end].clone(), experts)

    def write(self, slots: slice, start: int, segment: Segment, tokens: int) -> None:
        """Put the first tokens of a segment at `start` of each of these slots."""
        end = start + tokens
        self.kv[:, :, slots, :, start:end] = segment.kv[:, :, None, :, :tokens]
        if self.experts_SMLK is not None and segment.experts is not None:
            self.experts_SMLK[slots, start:end] = segment.experts[:tokens]
