"""Computing many tokens of several sequences at once: prompts, and sequences to be scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.builtins.torch_engine.attention import PrefillAttention
from miles.builtins.torch_engine.decoder import Decoder
from miles.builtins.torch_engine.kv_cache import KVCache


@dataclass(frozen=True)
class Piece:
    """A sequence of which the first `start` tokens are in its slot already."""

    tokens: Sequence[int]
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens) - self.start


def prefill(
    decoder: Decoder, cache: KVCache, first_slot: int, pieces: Sequence[Piece], max_tokens: int
) -> Iterator[tuple[range, list[int], Tensor]]:
    """Compute pieces, in ascending order of length, into consecutive slots.

    Yields, for each forward pass, which pieces it was about, how many tokens of each it computed, and their hidden
    states end to end, `[T, H]`. A piece of more than `max_tokens` takes several passes of its own.
    """
    for group in _groups(pieces, max_tokens):
        starts = [pieces[i].start for i in group]
        while any(starts[j] < len(pieces[i].tokens) for j, i in enumerate(group)):
            ends = [min(len(pieces[i].tokens), start + max_tokens) for i, start in zip(group, starts, strict=True)]
            attention = PrefillAttention(decoder.config, cache, first_slot + group.start, starts, ends)
            ids = [t for i, a, b in zip(group, starts, ends, strict=True) for t in pieces[i].tokens[a:b]]
            hidden_TH = decoder.forward(torch.tensor(ids, device=decoder.device), attention.positions_T, attention)
            yield group, [b - a for a, b in zip(starts, ends, strict=True)], hidden_TH
            starts = ends


def _groups(pieces: Sequence[Piece], max_tokens: int) -> Iterator[range]:
    """Runs of pieces of similar length: attention pads each to the longest of its run."""
    first, total = 0, 0
    for i, piece in enumerate(pieces):
        total += len(piece)
        padded = (i + 1 - first) * len(piece)
        if i > first and (total > max_tokens or padded > 2 * total):
            yield range(first, i)
            first, total = i, len(piece)
    yield range(first, len(pieces))
