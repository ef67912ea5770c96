"""The cache that running requests use, cut as they call for, and the CUDA graphs recorded on each cut.

Before the first request after a weight sync the cache is cut anew, from the same memory: what a run computes must not
depend on how long the process has lived, or a resumed run would differ from one that was never killed.
"""

from __future__ import annotations

import torch

from miles.builtins.torch_engine.decoder import Decoder
from miles.builtins.torch_engine.graphs import DecodeGraphs
from miles.builtins.torch_engine.kv_cache import KVCache, Memory


class Arena:
    def __init__(self, decoder: Decoder, cuda_graphs: bool):
        self.decoder = decoder
        self.use_graphs = cuda_graphs and DecodeGraphs.possible(decoder)
        self._memory: Memory | None = None
        self._cuts: dict[tuple[int, int], tuple[KVCache, DecodeGraphs | None]] = {}
        self._current: tuple[KVCache, DecodeGraphs | None] | None = None

    @property
    def cache(self) -> KVCache:
        assert self._current is not None  # cut before the first request is seated
        return self._current[0]

    @property
    def graphs(self) -> DecodeGraphs | None:
        return self._current[1] if self._current is not None else None

    def cut(self, slots: int, length: int) -> None:
        """Use a cache of this geometry from now on. What was in the one before is lost."""
        if self._memory is None or self._memory.tokens < slots * length:
            self.free()  # first, so that both are never there at once
            with torch.inference_mode(False):
                self._memory = Memory(self.decoder.config, slots * length, self.decoder.device, self.decoder.dtype)
        if (slots, length) not in self._cuts:
            cache = KVCache(self._memory, slots, length, self.decoder.exact)
            self._cuts[slots, length] = (cache, DecodeGraphs(self.decoder, cache) if self.use_graphs else None)
        self._current = self._cuts[slots, length]

    def drop_graphs(self) -> None:
        """They are recorded again when needed."""
        for _, graphs in self._cuts.values():
            if graphs is not None:
                graphs.clear()

    def free(self) -> None:
        """Give the memory back."""
        self._cuts.clear()
        self._current = self._memory = None
