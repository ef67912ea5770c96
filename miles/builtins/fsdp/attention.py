"""Attention over packed samples: each token sees its own sample and nothing of its neighbours.

The model runs on one row of `T` tokens, samples end to end, so that only attention has to know where a sample starts.
It is told by a `PackedLayout`, which travels to every layer as the keyword `packed`. Four kernels:

    sdpa    samples of similar length are laid side by side, padded to the longest of them, and attended with
            torch's causal SDPA. Padding on the right is invisible to causal attention: no mask is built, let alone
            one of `[T, T]`. Where all lengths agree (groups of one prompt often do) nothing is copied at all.
            What continues a shared prompt gets the prompt's keys and values in front of its own, and
            one mask `[length, prompt + length]` for each block.
    varlen  torch's varlen_attn, for bf16 on CUDA (miles.builtins.fsdp.varlen). The only one that a compiled layer
            takes in whole; the others interrupt it.
    flex    torch's flex_attention with a block mask per sample; compiled, so for CUDA.
    flash   `flash_attn_varlen_func` of the flash-attn packages.

`T` tokens, `A` attention heads, `D` their size, `S` slots of the padded layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from miles.api import ConfigError
from miles.builtins.fsdp.prefixes import Stretch, TokenTree
from miles.builtins.fsdp.varlen import (
    LARGEST_HEAD,
    Spans,
    flash_kernel,
    flash_packed,
    refuse,
    suits_varlen,
    varlen_packed,
)

SIMILAR = 0.8
"""Samples down to this share of the longest one's length are padded to it."""


@dataclass(frozen=True)
class Block:
    """Stretches of similar length, side by side in the padded layout, whose contexts are equally long."""

    first: int
    """Slot."""
    count: int
    length: int
    """Of the longest."""
    context: Tensor | None
    """`[count * context length]`: places of the tokens that come before each stretch."""

    @property
    def context_length(self) -> int:
        return 0 if self.context is None else len(self.context) // self.count


class PackedLayout:
    """Where the samples of a micro-batch lie. Built once a micro-batch, read by every layer.

    Args:
        shared: as in `MicroBatch.shared`; empty to compute every sample whole.
        gathers: as in `Spans.of`.

    Attributes:
        tree: which tokens are computed. From here on `T` counts these.
        blocks: the padded layout, in which they have `slots` places.
    """

    def __init__(
        self, bounds: Sequence[int], device: torch.device | str, shared: Sequence[int] = (), gathers: bool = False
    ):
        self.device = device
        self.tree = TokenTree.of(bounds, shared, device)
        stretches = self.tree.stretches
        self.lengths = [stretch.length for stretch in stretches]
        self.spans = Spans.of(stretches, device, gathers)
        self.blocks: list[Block] = []
        self.slots = 0
        self._first_slot = [0] * len(stretches)
        self._bands: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        for members in _similar(stretches):
            self.blocks.append(self._block([stretches[i] for i in members]))
            longest = self.blocks[-1].length
            for place, member in enumerate(members):
                self._first_slot[member] = self.slots + place * longest
            self.slots += len(members) * longest

    def _block(self, members: Sequence[Stretch]) -> Block:
        contexts = [member.context for member in members if member.context]
        places = [torch.arange(context.start, context.start + context.length) for context in contexts]
        context = torch.cat(places).to(self.device) if places else None
        return Block(self.slots, len(members), members[0].length, context)

    @cached_property
    def slot_T(self) -> Tensor | None:
        """Slot of each token; None when every token is in its place already."""
        starts = [stretch.start for stretch in self.tree.stretches]
        pairs = list(zip(self._first_slot, self.lengths, strict=True))
        if self._first_slot == starts and self.slots == sum(self.lengths):
            return None
        slots = torch.cat([torch.arange(first, first + length) for first, length in pairs])
        return slots.to(self.device)

    def mask(self, block: Block, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive, `[length, context + length]`: causal, and at most `window` tokens back, the token itself included.
        None where plain causality says it all."""
        context, length = block.context_length, block.length
        if not context and (window is None or window >= length):
            return None
        key = (context, length, window or 0, dtype)
        if key not in self._bands:
            distance = torch.arange(length)[:, None] + context - torch.arange(context + length)
            hidden = (distance < 0) | (distance >= (window or context + length))
            self._bands[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).to(self.device)
        return self._bands[key]

    def block_mask(self, window: int | None) -> Any:
        """flex_attention's mask for this packing."""
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self, window)
        return self._block_masks[window]

    @cached_property
    def _block_masks(self) -> dict[int | None, Any]:
        return {}


def _similar(stretches: Sequence[Stretch]) -> list[list[int]]:
    """In blocks of similar length and equally long contexts, longest first; each block's longest leads it."""

    def context(index: int) -> int:
        return stretches[index].context.length if stretches[index].context else 0  # type: ignore[union-attr]

    blocks: list[list[int]] = []
    for i in sorted(range(len(stretches)), key=lambda i: (-context(i), -stretches[i].length, i)):
        leads = blocks[-1][0] if blocks else i
        if blocks and context(leads) == context(i) and stretches[i].length >= SIMILAR * stretches[leads].length:
            blocks[-1].append(i)
        else:
            blocks.append([i])
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
    refuse(module, kwargs)
    per_token = [x[0].transpose(0, 1) for x in (query, key, value)]
    padded = [_to_slots(x, packed) for x in per_token]
    repeats = query.shape[1] // key.shape[1]
    blocks = []
    for block in packed.blocks:
        span, shape = slice(block.first, block.first + block.count * block.length), (block.count, block.length)
        q, k, v = (x[span].unflatten(0, shape) for x in padded)
        if block.context is not None:
            shape = (block.count, block.context_length)
            before = (x.index_select(0, block.context).unflatten(0, shape) for x in per_token[1:])
            k, v = (torch.cat(pair, 1) for pair in zip(before, (k, v), strict=True))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = packed.mask(block, sliding_window, q.dtype)
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
    refuse(module, kwargs)
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
    "sdpa": torch.compiler.disable(sdpa_packed),
    "varlen": varlen_packed,
    "flex": torch.compiler.disable(flex_packed),
    "flash": torch.compiler.disable(flash_packed),
}
WITHOUT_MASK = ("varlen", "flash")
"""Kernels that a shared prompt costs no mask."""


def choose(attention: str, device: str, dtype: torch.dtype, head_size: int) -> str:
    """One of `KERNELS` for `train.attention`, where `auto` is varlen if it can be and sdpa if not.

    Raises:
        ConfigError: the kernel cannot run here.
    """
    where = torch.device(device)
    if attention == "auto":
        return "varlen" if suits_varlen(where, dtype, head_size) else "sdpa"
    if attention == "flash":
        flash_kernel()
    if attention != "sdpa" and where.type != "cuda":
        raise ConfigError(f"train.attention={attention!r} needs a CUDA device, not {device!r}; use --attention sdpa")
    if attention == "varlen" and not suits_varlen(where, dtype, head_size):
        raise ConfigError(
            f"train.attention='varlen' needs --train-dtype bf16, heads of a multiple of 8 up to {LARGEST_HEAD} (here "
            f"{head_size}) and a GPU of compute capability 8.0 or later; use --attention sdpa"
        )
    return attention


def register(attention: str) -> str:
    """Make one of `KERNELS` known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(f"miles_{attention}", KERNELS[attention])
    return f"miles_{attention}"


@cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _block_mask(layout: PackedLayout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    stretches = layout.tree.stretches
    contexts = [stretch.context or Stretch(0, 0) for stretch in stretches]
    lengths = torch.tensor(layout.lengths)

    def per_token(values: Sequence[int]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values), lengths).to(layout.device)

    stretch_T = per_token(range(len(stretches)))
    first_T = per_token([context.start for context in contexts])
    end_T = per_token([context.start + context.length for context in contexts])
    offset_T = per_token([c.length - s.start for c, s in zip(contexts, stretches, strict=True)])
    position_T = torch.arange(len(stretch_T), device=layout.device) + offset_T

    def own_past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = (key >= first_T[query]) & (key < end_T[query])
        seen = (query >= key) & (before | (stretch_T[query] == stretch_T[key]))
        return seen & (position_T[query] - position_T[key] < window) if window else seen

    tokens = len(stretch_T)
    return create_block_mask(own_past, None, None, tokens, tokens, device=str(layout.device))
