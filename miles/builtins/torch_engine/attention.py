"""Causal attention over slots of the cache: many tokens of each sequence (prefill), or one of each (decode).

Dimensions: `_T` tokens of all sequences end to end, `_B` sequences, `_N` heads, `_D` head, `_Q` and `_M` padded queries
and keys of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.builtins.torch_engine.decoder import DecoderConfig
from miles.builtins.torch_engine.exact import attend
from miles.builtins.torch_engine.kv_cache import KVCache


class _Cached:
    """Stores keys, values and expert choices of the tokens at `slots_T`, `positions_T`."""

    def __init__(self, config: DecoderConfig, cache: KVCache, slots_T: Tensor, positions_T: Tensor):
        self.config, self.cache = config, cache
        self.slots_T, self.positions_T = slots_T, positions_T
        self.rows = cache.rows(slots_T, positions_T)

    def store(self, layer: int, k_TND: Tensor, v_TND: Tensor) -> None:
        width = self.config.head_dim
        self.cache.keys[layer].index_copy_(0, self.rows, k_TND.reshape(-1, width))
        self.cache.values[layer].index_copy_(0, self.rows, v_TND.reshape(-1, width))

    def record_experts(self, chosen_TLK: Tensor) -> None:
        table = self.cache.experts_SMLK
        assert table is not None  # a model with experts has it
        table[self.slots_T, self.positions_T] = chosen_TLK.to(table.dtype)


class PrefillAttention(_Cached):
    """Sequences in consecutive slots; each brings the tokens from `starts[b]` up to `ends[b]`, end to end."""

    def __init__(
        self, config: DecoderConfig, cache: KVCache, first_slot: int, starts: Sequence[int], ends: Sequence[int]
    ):
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        device = cache.kv.device
        starts_B = torch.tensor(starts)
        counts_B = torch.tensor(counts)
        row_T = torch.repeat_interleave(torch.arange(len(counts)), counts_B)
        step_T = torch.arange(sum(counts)) - torch.repeat_interleave(counts_B.cumsum(0) - counts_B, counts_B)
        positions_T = starts_B[row_T] + step_T
        super().__init__(config, cache, (row_T + first_slot).to(device), positions_T.to(device))
        self.slots = slice(first_slot, first_slot + len(counts))
        self.queries, self.keys = max(counts), max(ends)
        even = min(counts) == self.queries
        self.padded_T = None if even else (row_T * self.queries + step_T).to(device)
        self.positions_BQ = (starts_B.unsqueeze(1) + torch.arange(self.queries)).to(device)
        self.masks = self._masks() if self._needs_mask(starts) and not cache.exact else {}

    def _needs_mask(self, starts: Sequence[int]) -> bool:
        """Without cached prefixes plain causality is enough: a padded query is never read."""
        return any(starts) or any(window < self.keys for window in self._windows() if window)

    def _windows(self) -> set[int | None]:
        return {self.config.window(layer) for layer in range(self.config.num_layers)}

    def _masks(self) -> dict[int | None, Tensor]:
        """For each window size, `[B, 1, Q, M]`: which keys a query sees."""
        query_BQ1 = self.positions_BQ.unsqueeze(2)
        key_M = torch.arange(self.keys, device=self.positions_BQ.device)
        causal = key_M <= query_BQ1
        return {
            window: (causal if window is None else causal & (key_M > query_BQ1 - window)).unsqueeze(1)
            for window in self._windows()
        }

    def __call__(self, layer: int, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        self.store(layer, k_TND, v_TND)
        heads, width = q_TND.shape[1:]
        if self.padded_T is None:
            q_BQND = q_TND.reshape(-1, self.queries, heads, width)
        else:
            q_BQND = q_TND.new_zeros(self.slots.stop - self.slots.start, self.queries, heads, width)
            q_BQND.view(-1, heads, width).index_copy_(0, self.padded_T, q_TND)
        out_TX = self._attend(layer, q_BQND).reshape(-1, heads * width)
        return out_TX if self.padded_T is None else out_TX[self.padded_T]

    def _attend(self, layer: int, q_BQND: Tensor) -> Tensor:
        """`[B, Q, N, D]` or `[B, Q, N * D]`."""
        window = self.config.window(layer)
        k, v = self.cache.kv[layer, :, self.slots, :, : self.keys]
        if self.cache.exact:
            return attend(q_BQND, k, v, self.positions_BQ, window)
        mask = self.masks.get(window)
        group = q_BQND.shape[2] // self.config.num_kv_heads
        if mask is not None and group > 1:  # the fused kernels take a mask or groups of heads, not both
            k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
        return F.scaled_dot_product_attention(
            q_BQND.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1
        ).transpose(1, 2)


class DecodeAttention(_Cached):
    """One token in each of the first `B` slots. `keys` is how far into the slots any of them looks."""

    def __init__(self, config: DecoderConfig, cache: KVCache, positions_B: Tensor, keys: int, even: bool):
        """`even` says that all positions equal `keys - 1`, so that nothing needs to be masked."""
        count = len(positions_B)
        super().__init__(config, cache, torch.arange(count, device=positions_B.device), positions_B)
        self.keys, self.even = keys, even
        group = config.num_heads // config.num_kv_heads
        self.kernel = _decode_kernel(config.head_dim, group) if cache.kv.is_cuda else None
        self.products = cache.kv.dtype == torch.float32 and cache.kv.device.type == "cpu"
        windows = {config.window(layer) for layer in range(config.num_layers)}
        masked = self.kernel is None and not cache.exact
        self.masks = {window: self._mask(window) for window in windows} if masked else {}

    def _mask(self, window: int | None) -> Tensor | None:
        """Additive, `[B, 1, 1, M]`; `[B * N, 1, M]` for the path by products. None where all keys are seen."""
        if self.even and (window is None or window >= self.keys):
            return None
        key_M = torch.arange(self.keys, device=self.positions_T.device)
        last_B1 = self.positions_T.unsqueeze(1)
        hidden = key_M > last_B1
        if window is not None:
            hidden |= key_M <= last_B1 - window
        mask_BM = torch.zeros(hidden.shape, device=hidden.device, dtype=self.cache.kv.dtype)
        mask_BM.masked_fill_(hidden, -torch.inf)
        if self.products:
            return mask_BM.repeat_interleave(self.cache.heads, 0).unsqueeze(1)
        return mask_BM[:, None, None]

    def __call__(self, layer: int, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        self.store(layer, k_TND, v_TND)
        count, heads, width = q_TND.shape
        kv_heads = self.cache.heads
        k, v = self.cache.kv[layer, :, :count, :, : self.keys]  # [B, N, M, D]
        if self.kernel is not None:
            return self.kernel(q_TND, k, v, self.positions_T, self.config.window(layer)).view(count, heads * width)
        if self.cache.exact:
            window, positions_B1 = self.config.window(layer), self.positions_T.unsqueeze(1)
            return attend(q_TND.unsqueeze(1), k, v, positions_B1, window).squeeze(1)
        mask = self.masks[self.config.window(layer)]
        if not self.products:
            q = q_TND.view(count, kv_heads, -1, width)
            expanded = mask.expand(-1, 1, q.shape[2], -1) if mask is not None else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=expanded).reshape(count, heads * width)
        # On a CPU two matrix products beat the fused kernel, which is made for many queries a sequence.
        q_XGD = q_TND.reshape(count * kv_heads, -1, width)
        k_XMD, v_XMD = k.flatten(0, 1), v.flatten(0, 1)
        start = q_XGD.new_zeros(1, 1, 1) if mask is None else mask
        weights = torch.baddbmm(start, q_XGD, k_XMD.transpose(1, 2), beta=float(mask is not None), alpha=width**-0.5)
        return torch.bmm(torch.softmax(weights, -1), v_XMD).view(count, heads * width)


@cache
def _decode_kernel(head_dim: int, group: int) -> Callable[..., Tensor] | None:
    """The engine's own kernel, where there is a Triton to compile it and it serves heads of this size."""
    try:
        from miles.builtins.torch_engine import decode_kernel
    except ImportError:
        return None
    return decode_kernel.attend if decode_kernel.fits(head_dim, group) else None
