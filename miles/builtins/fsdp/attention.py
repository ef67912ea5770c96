"""Attention over packed samples: each token sees its own sample and nothing of its neighbours.

The model runs on one row of `T` tokens, samples end to end, so that only attention has to know where a sample starts.
It is told by a `PackedLayout`, which travels to every layer as the keyword `packed`. Three kernels:

    sdpa    samples of similar length are laid side by side, padded to the longest of them, and attended with
            torch's causal SDPA. Padding on the right is invisible to causal attention: no mask is built, let alone
            one of `[T, T]`. Where all lengths agree (groups of one prompt often do) nothing is copied at all.
    flex    torch's flex_attention with a block mask per sample; compiled, so for CUDA.
    flash   `flash_attn_varlen_func` of the flash-attn package.

`T` tokens, `A` attention heads, `D` their size, `S` slots of the padded layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miles.api import ConfigError

SIMILAR = 0.8
"""Samples down to this share of the longest one's length are padded to it."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of models whose attention is of another form; dropping one would be silently wrong."""


class PackedLayout:
    """Where the samples of a micro-batch lie. Built once a micro-batch, read by every layer.

    Attributes:
        groups: `(first slot, samples, length)` of each block of similar samples in the padded layout.
        slots: how many slots these have together.
    """

    def __init__(self, bounds: Sequence[int], device: torch.device | str):
        self.bounds = list(bounds)
        self.device = device
        self.lengths = [end - start for start, end in pairwise(bounds)]
        self.groups: list[tuple[int, int, int]] = []
        self.slots = 0
        self._first_slot = [0] * len(self.lengths)
        self._bands: dict[tuple[int, int], Tensor] = {}
        for members in _similar(self.lengths):
            longest = self.lengths[members[0]]
            self.groups.append((self.slots, len(members), longest))
            for place, sample in enumerate(members):
                self._first_slot[sample] = self.slots + place * longest
            self.slots += len(members) * longest

    @cached_property
    def slot_T(self) -> Tensor | None:
        """Slot of each token; None when every token is in its place already."""
        pairs = list(zip(self._first_slot, self.lengths, strict=True))
        if self._first_slot == self.bounds[:-1] and self.slots == self.bounds[-1]:
            return None
        slots = torch.cat([torch.arange(first, first + length) for first, length in pairs])
        return slots.to(self.device)

    @cached_property
    def cumulative(self) -> Tensor:
        """int32 bounds, as flash-attn wants them."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    def band(self, length: int, window: int) -> Tensor:
        """`[length, length]` bool: causal, and at most `window` tokens back, the token itself included."""
        if (length, window) not in self._bands:
            position = torch.arange(length, device=self.device)
            distance = position[:, None] - position[None, :]
            self._bands[length, window] = (distance >= 0) & (distance < window)
        return self._bands[length, window]

    def block_mask(self, window: int | None) -> Any:
        """flex_attention's mask for this packing."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self, window)
        return self._block_masks[window]

    @cached_property
    def _block_masks(self) -> dict[int | None, Any]:
        return {}


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Samples in blocks of similar length, longest first; each block's longest leads it."""
    blocks: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if blocks and lengths[sample] >= SIMILAR * lengths[blocks[-1][0]]:
            blocks[-1].append(sample)
        else:
            blocks.append([sample])
    return blocks


class _FromSlots(torch.autograd.Function):
    """Rows `slot_T` of a padded tensor. Slots are unique, so the gradient is a copy, not a sum."""

    @staticmethod
    def forward(ctx: Any, padded_SX: Tensor, slot_T: Tensor) -> Tensor:
        ctx.save_for_backward(slot_T)
        ctx.slots = len(padded_SX)
        return padded_SX.index_select(0, slot_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None]:
        (slot_T,) = ctx.saved_tensors
        return grad_TX.new_zeros(ctx.slots, *grad_TX.shape[1:]).index_copy_(0, slot_T, grad_TX), None


def _to_slots(values_TX: Tensor, layout: PackedLayout) -> Tensor:
    """`[T, ...]` into the padded layout `[S, ...]`, zeros where there is no token."""
    if layout.slot_T is None:
        return values_TX
    return values_TX.new_zeros(layout.slots, *values_TX.shape[1:]).index_copy(0, layout.slot_T, values_TX)


# ------------------------------------------------------------------------------------------------------------- kernels


def sdpa_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, A, T, D]` queries and keys, returns `[1, T, A, D]`."""
    _refuse(module, kwargs)
    query_SAD, key_SAD, value_SAD = (_to_slots(x[0].transpose(0, 1), packed) for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    blocks = []
    for first, count, length in packed.groups:
        block = slice(first, first + count * length)
        q, k, v = (x[block].unflatten(0, (count, length)).transpose(1, 2) for x in (query_SAD, key_SAD, value_SAD))
        mask = packed.band(length, sliding_window) if sliding_window and sliding_window < length else None
        shared = repeats > 1 and _shares_keys(q, mask)
        if repeats > 1 and not shared:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
        )
        blocks.append(out.transpose(1, 2).flatten(0, 1))
    out_SAD = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    out_TAD = out_SAD if packed.slot_T is None else _FromSlots.apply(out_SAD, packed.slot_T)
    return out_TAD.unsqueeze(0), None


def _shares_keys(query: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key heads than query heads: on CUDA flash does, memory-efficient does not."""
    return not query.is_cuda or (mask is None and query.dtype in (torch.bfloat16, torch.float16))


def flash_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same through flash-attn; its backward is deterministic here."""
    _refuse(module, kwargs)
    longest = max(packed.lengths)
    query_TAD, key_TAD, value_TAD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_TAD = _flash_kernel()(
        query_TAD,
        key_TAD,
        value_TAD,
        packed.cumulative,
        packed.cumulative,
        longest,
        longest,
        softmax_scale=scaling,
        causal=True,
        window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
        deterministic=True,
    )
    return out_TAD.unsqueeze(0), None


def flex_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same through flex_attention, compiled on CUDA."""
    _refuse(module, kwargs)
    out = _flex_kernel(query.is_cuda)(
        query,
        key,
        value,
        block_mask=packed.block_mask(sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


KERNELS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "sdpa": sdpa_packed,
    "flex": flex_packed,
    "flash": flash_packed,
}


def register(attention: str, device: str) -> str:
    """Make one of `KERNELS` known to transformers; returns the name for `attn_implementation`.

    Raises:
        ConfigError: the kernel cannot run here.
    """
    on_cuda = torch.device(device).type == "cuda"
    if attention == "flash":
        _flash_kernel()
    if attention != "sdpa" and not on_cuda:
        raise ConfigError(f"train.attention={attention!r} needs a CUDA device, not {device!r}; use --attention sdpa")
    AttentionInterface.register(f"miles_{attention}", KERNELS[attention])
    return f"miles_{attention}"


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    odd = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if not getattr(module, "is_causal", True):
        odd.append("is_causal=False")
    if odd:
        raise ConfigError(f"the attention of {type(module).__name__} uses {', '.join(odd)}; backend `fsdp` does not")


@cache
def _flash_kernel() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ConfigError(
            f"train.attention='flash' needs the flash-attn package ({error}); install it (`pip install flash-attn "
            "--no-build-isolation`, CUDA only) or use --attention sdpa"
        ) from error
    return flash_attn_varlen_func


@cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _block_mask(layout: PackedLayout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(layout.lengths, device=layout.device)
    sample_T = torch.repeat_interleave(torch.arange(len(layout.lengths), device=layout.device), lengths)

    def own_past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (sample_T[query] == sample_T[key])
        return seen & (query - key < window) if window else seen

    tokens = layout.bounds[-1]
    return create_block_mask(own_past, None, None, tokens, tokens, device=str(layout.device))
