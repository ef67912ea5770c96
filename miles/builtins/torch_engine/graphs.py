"""Decoding through CUDA graphs: one recorded step for each bucket of batch size and of length.

A step of a small model is dominated by launching its hundreds of kernels; a graph launches them all at once. Kernels
are recorded with fixed addresses and shapes, so requests are padded up to the bucket: padded rows write to slots that
are free and nobody reads what they compute.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from miles.builtins.torch_engine.attention import DecodeAttention
from miles.builtins.torch_engine.decoder import Decoder
from miles.builtins.torch_engine.kv_cache import KVCache

SHORTEST = 512
UNRECORDED = 2
"""Uses of a bucket before it is recorded: many are passed through once, while requests come and go, and libraries
allocate and compile on first use, which must not be recorded."""


def batch_bucket(count: int, capacity: int) -> int:
    """Powers of two, and three quarters of them."""
    size = 1
    while size < count:
        size *= 2
    if size >= 8 and count <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, capacity)


def length_bucket(keys: int, longest: int) -> int:
    size = SHORTEST
    while size < keys:
        size *= 2
    return min(size, longest)


class DecodeGraphs:
    """Belongs to one decoder and one cache, whose tensors must stay where they are."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self.decoder, self.cache = decoder, cache
        self.ids_S = torch.zeros(cache.slots, dtype=torch.int64, device=decoder.device)
        self.positions_S = torch.zeros_like(self.ids_S)
        self.pool = torch.cuda.graph_pool_handle()
        self.uses: Counter[tuple[int, int]] = Counter()
        self.recorded: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @staticmethod
    def possible(decoder: Decoder) -> bool:
        """Experts of other types than bf16 are computed in a way that needs the host."""
        return decoder.device.type == "cuda" and not (decoder.config.routes and decoder.dtype != torch.bfloat16)

    def clear(self) -> None:
        self.recorded.clear()
        self.uses.clear()

    def step(self, ids_B: Tensor, positions_B: Tensor, keys: int) -> Tensor:
        """Logits `[B, V]`, valid until the next step."""
        count = len(ids_B)
        self.ids_S[:count] = ids_B
        self.positions_S[:count] = positions_B
        bucket = (batch_bucket(count, self.cache.slots), length_bucket(keys, self.cache.length))
        self.uses[bucket] += 1
        if bucket not in self.recorded:
            if self.uses[bucket] <= UNRECORDED:
                return self._forward(*bucket)[:count]
            self.recorded[bucket] = self._record(*bucket)
        graph, logits = self.recorded[bucket]
        graph.replay()
        return logits[:count]

    def _record(self, size: int, keys: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = self._forward(size, keys)
        return graph, logits

    def _forward(self, size: int, keys: int) -> Tensor:
        positions = self.positions_S[:size]
        attention = DecodeAttention(self.decoder.config, self.cache, positions, keys, even=False)
        return self.decoder.logits(self.decoder.forward(self.ids_S[:size], positions, attention))
