"""How many tokens' keys and values fit, and how they are cut into slots."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from miles.builtins.torch_engine.decoder import DecoderConfig
from miles.builtins.torch_engine.kv_cache import KVCache
from miles.builtins.torch_engine.options import TorchEngineOptions

FEWEST_SLOTS, SHORTEST_SLOT = 16, 64
SPARE_BYTES = 512 * 2**20
"""Of a machine without an accelerator, where memory that is never used is better not touched."""


@dataclass(frozen=True)
class Budget:
    kv_tokens: int
    prefix_tokens: int
    max_running: int
    max_len: int
    """Longest sequence that is served."""
    spare_tokens: int
    """Tokens whose memory is taken before they are there, to spare cutting the cache anew when they come."""

    @classmethod
    def of(cls, options: TorchEngineOptions, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Budget:
        """From the options; where they are silent, from the device's memory: two thirds of it for what is running."""
        wanted = min(options.max_len or config.max_position_embeddings, config.max_position_embeddings)
        size = KVCache.bytes_per_token(config, dtype)
        room = int(options.memory_fraction * _memory(device)) // size
        room = min(room, 2 * options.max_running * wanted)
        kv_tokens = options.kv_cache_tokens or max(2 * room // 3, 2)
        kept = options.prefix_cache_tokens
        prefix_tokens = room // 3 if kept is None else kept
        spare = kv_tokens if device.type == "cuda" else SPARE_BYTES // size
        return cls(kv_tokens, prefix_tokens, options.max_running, min(wanted, kv_tokens), spare)

    def geometry(self, slots: int, length: int, wished: int) -> tuple[int, int]:
        """Slots, and tokens in each: room for this many requests, or as many as fit.

        `length` is what their tokens need now, `wished` what they may come to need; that much is given when there is
        memory to spare. Sizes are doubled from the smallest, so that a cache is cut anew only a few times in its life.
        """
        slots = min(_doubled(FEWEST_SLOTS, slots), self.max_running)
        longest = min(_doubled(SHORTEST_SLOT, wished), self.max_len)
        if slots * longest <= min(self.kv_tokens, self.spare_tokens):
            return slots, longest
        longer = min(_doubled(SHORTEST_SLOT, length), self.max_len)
        return max(min(slots, self.kv_tokens // longer), 1), longer


def _doubled(start: int, least: int) -> int:
    while start < least:
        start *= 2
    return start


def _memory(device: torch.device) -> int:
    """Bytes of the accelerator, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
