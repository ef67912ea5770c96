"""Context parallelism: the ranks of a group divide the tokens of each micro-batch, and in attention its heads.

All ranks of a group are given the same micro-batch. Each computes a contiguous slice of its tokens, as long as the
others' (the last ones are filled up with padding). Only attention looks beyond a token, so there the ranks exchange:
each gives away the heads of its tokens and receives all tokens of its heads, `[t, A] -> [T, A / ranks]`; every kernel
of `miles.builtins.fsdp.attention` works on that as on a whole micro-batch of a smaller model. Then back again. Where
key heads are too few to be divided they are repeated. (DeepSpeed-Ulysses, arXiv:2309.14509.)

A token is scored from the hidden state of the one before it. Those that another rank computed, mostly one, are sent.
Log-probabilities, entropies and values of all slices are gathered, so that each rank of a group has the whole loss and
the same sums; what flows back into a rank is the gradient of its own slice, and FSDP2 adds up the ranks.

`T` computed tokens of the micro-batch, `t` of a slice, `A` query heads, `D` their size, `R` ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from miles.api import ConfigError
from miles.builtins.fsdp.attention import KERNELS, PackedLayout
from miles.builtins.fsdp.keeping_step import Collectives, all_gather
from miles.builtins.fsdp.prefixes import TokenTree
from miles.toolkit import Config


class ContextGroup:
    """Neighbouring ranks that work on the same micro-batches."""

    def __init__(self, size: int, collectives: Collectives):
        assert dist.group.WORLD is not None
        self.group = subgroup(dist.group.WORLD, size)
        self.size, self.rank = size, self.group.rank()
        self.collectives = collectives

    def slice_of(self, bounds: Sequence[int], shared: Sequence[int], device: torch.device) -> TokenSlice:
        """This rank's part of a micro-batch; `shared` as in `PackedLayout`."""
        return TokenSlice(self, TokenTree.of(bounds, shared, "cpu"), device)


@cache
def subgroup(world: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """Of `size` neighbouring ranks; models in a process have it in common."""
    return dist.new_subgroups(group_size=size, group=world)[0]


class TokenSlice:
    """The tokens that this rank computes.

    Attributes:
        tokens: of the micro-batch.
        length: of a slice, the same on all ranks.
        stands_for: when this is a token of padding in the place of a micro-batch that did not fit (see `keeping_step`),
            the slice of that. Then buffers have the size that the other ranks expect, and nothing is in them.
    """

    def __init__(self, group: ContextGroup, tree: TokenTree, device: torch.device):
        self.group = group
        self.tokens = sum(stretch.length for stretch in tree.stretches)
        self.length = -(-self.tokens // group.size)
        self.stands_for: TokenSlice | None = None
        places = torch.arange(self.tokens)
        before = (places - 1).clamp(min=0) if tree.before_U is None else tree.before_U
        crosses = before // self.length != places // self.length
        sent = before[crosses].unique()
        self.sent = len(sent)
        """Hidden states that are sent to another rank."""
        first = group.rank * self.length
        before_t = self._padded(before)[first : first + self.length]
        own = (before_t >= first) & (before_t < first + self.length)
        after_own = self.length + torch.searchsorted(sent, before_t)
        self._before_t = torch.where(own, before_t - first, after_own).clamp(max=self.length + self.sent - 1).to(device)
        mine = ((sent >= first) & (sent < first + self.length)).nonzero().flatten()
        self._sent_slots, self._sent_rows = mine.to(device), (sent[mine] - first).to(device)

    def _padded(self, values_T: Tensor) -> Tensor:
        missing = self.group.size * self.length - len(values_T)
        return torch.cat([values_T, values_T.new_zeros(missing, *values_T.shape[1:])]) if missing else values_T

    def cut(self, values_T: Tensor) -> Tensor:
        """`[T, ...]` -> `[t, ...]`; no gradient flows back."""
        return self._padded(values_T)[self.group.rank * self.length :][: self.length]

    def gather(self, values_t: Tensor) -> Tensor:
        """`[t, ...]` of all ranks -> `[T, ...]`; each gets its own part of the gradient back."""
        return _Collect.apply(values_t, self)[: self.tokens]

    def predecessors(self, values_tH: Tensor) -> Tensor:
        """For each token of the slice the row of the one before it, whichever rank computed that."""
        there = self.stands_for or self
        if not there.sent:
            return values_tH.index_select(0, self._before_t)
        sent = values_tH.new_zeros(self.sent, *values_tH.shape[1:])
        sent = sent.index_copy(0, self._sent_slots, values_tH.index_select(0, self._sent_rows))
        return torch.cat([values_tH, _SelfAdjoint.apply(sent, self.add_up)]).index_select(0, self._before_t)

    def heads(self, values_tX: Tensor) -> Tensor:
        """`[t, R, X]`, one `X` for each rank -> `[T, X]`, what all ranks have for this one."""
        rows = _SelfAdjoint.apply(values_tX.transpose(0, 1).contiguous(), self.exchange)
        return rows.flatten(0, 1)[: self.tokens]

    def slices(self, values_TX: Tensor) -> Tensor:
        """The inverse: `[T, X]` -> `[t, R, X]`."""
        rows = self._padded(values_TX).unflatten(0, (self.group.size, self.length))
        return _SelfAdjoint.apply(rows.contiguous(), self.exchange).transpose(0, 1)

    # ----------------------------------------------------------------------------------------------------- collectives

    def exchange(self, rows_RtX: Tensor) -> Tensor:
        """Row `r` goes to rank `r`, and comes from it."""

        def communicate(given: Tensor) -> Tensor:
            received = torch.empty_like(given)
            dist.all_to_all_single(received, given, group=self.group.group)
            return received

        return self._take_part("exchange", communicate, rows_RtX, lambda there: (self.group.size, there.length))

    def collect(self, rows_tX: Tensor) -> Tensor:
        """`[t, ...]` -> `[R * t, ...]`."""

        def communicate(given: Tensor) -> Tensor:
            received = given.new_empty(self.group.size * len(given), *given.shape[1:])
            all_gather(received, given, group=self.group.group)
            return received

        return self._take_part("collect", communicate, rows_tX, lambda there: (there.length,))

    def add_up(self, rows_SH: Tensor) -> Tensor:
        """Each row is one rank's, zeros on the others."""

        def communicate(given: Tensor) -> Tensor:
            total = given.clone()
            dist.all_reduce(total, group=self.group.group)
            return total

        return self._take_part("border", communicate, rows_SH, lambda there: (there.sent,))

    def _take_part(
        self,
        kind: str,
        communicate: Callable[[Tensor], Tensor],
        given: Tensor,
        shape: Callable[[TokenSlice], tuple[int, ...]],
    ) -> Tensor:
        """`communicate`s what is given. In the place of another slice: something of its `shape` (the first dimensions),
        and nothing comes of it."""
        collectives, there = self.group.collectives, self.stands_for
        if there is None:
            _, received = collectives.take_part(kind, lambda: communicate(given.contiguous()))
            assert received is not None  # only what stands in for another slice is ever left out
            return received
        first = shape(there)
        blank = given.new_zeros(*first, *given.shape[len(first) :])
        collectives.take_part(kind, lambda: communicate(blank))
        return given.new_zeros(len(given) * (self.group.size if kind == "collect" else 1), *given.shape[1:])


class _SelfAdjoint(torch.autograd.Function):
    """What is its own gradient: rows that are exchanged come back, and what all add up all may use."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, communicate: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.communicate = communicate
        return communicate(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.communicate(grad), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_tX: Tensor, part: TokenSlice) -> Tensor:
        ctx.rows = slice(part.group.rank * len(rows_tX), (part.group.rank + 1) * len(rows_tX))
        return part.collect(rows_tX)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RX: Tensor) -> tuple[Tensor, None]:
        return grad_RX[ctx.rows], None


# ---------------------------------------------------------------------------------------------------------- attention


def ulysses_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Callable[..., tuple[Tensor, None]],
    part: TokenSlice,
    packed: PackedLayout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on a slice: `[1, A, t, D]` queries and keys, returns `[1, t, A, D]`."""
    ranks = part.group.size
    repeats = math.lcm(key.shape[1], ranks) // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    pieces = [x[0].transpose(0, 1).unflatten(1, (ranks, -1)) for x in (query, key, value)]  # [t, R, A / R, D]
    received_TX = part.heads(torch.cat([piece.flatten(2) for piece in pieces], -1))
    widths = [piece.shape[2] * piece.shape[3] for piece in pieces]
    mine = [
        columns.unflatten(1, piece.shape[2:]).transpose(0, 1).unsqueeze(0)
        for columns, piece in zip(received_TX.split(widths, 1), pieces, strict=True)
    ]
    out_1TAD, _ = kernel(module, *mine, attention_mask, packed=packed, **kwargs)
    back_tRX = part.slices(out_1TAD[0].flatten(1))
    return back_tRX.unflatten(2, out_1TAD.shape[2:]).flatten(1, 2).unsqueeze(0), None


def register(attention: str) -> str:
    """Make a kernel known to transformers, for slices; returns the name for `attn_implementation`."""
    name = f"miles_{attention}_ulysses"
    AttentionInterface.register(name, torch.compiler.disable(partial(ulysses_packed, kernel=KERNELS[attention])))
    return name


def check_context(config: Config, world_size: int, hf_config: Any) -> None:
    """Raises ConfigError: ranks or heads cannot be divided by `train.context_parallel_size`, or bits would depend on
    it."""
    train = config.train
    size, heads = train.context_parallel_size, hf_config.get_text_config().num_attention_heads
    for what, number in (("train ranks", world_size), ("attention heads of the model", heads)):
        if number % size:
            common = math.gcd(world_size, heads)
            fits = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"train.context_parallel_size={size} does not divide the {number} {what}; "
                f"--context-parallel-size {' or '.join(fits)} would"
            )
    if train.reproducible_ranks is not None and (size > 1 or train.fsdp_reshard == "step"):
        raise ConfigError(
            "--reproducible-ranks adds up each micro-batch's gradient by itself, and whole: it needs "
            "--context-parallel-size 1 and --fsdp-reshard layer or auto"
        )
