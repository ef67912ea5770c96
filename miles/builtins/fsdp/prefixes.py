"""What the samples of a micro-batch have in common is computed once: the prompt of a group, above all.

Samples that answer the same prompt begin with the same tokens, so the same hidden states, keys and values. Laid out as
a tree, the prompt is a stretch of its own and each response one that continues it:

    prompt prompt prompt | answer answer            T: samples end to end, as everybody else sees them
    prompt prompt prompt | answer answer answer
    prompt prompt prompt | answer answer answer | answer answer        U: what is computed

Gradients add up in the prompt's stretch, so the result is that of the whole samples; with long prompts and short
answers it comes several times as fast. `T` tokens of the micro-batch, `U` tokens that are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

WORTH = 0.1
"""Share of the tokens that must be spared: attention pays for a prompt apart from its answers."""


@dataclass(frozen=True)
class Stretch:
    """Tokens `[start, start + length)` of `U`, which follow those of `context`, if it has one."""

    start: int
    length: int
    context: Stretch | None = None


@dataclass(frozen=True)
class TokenTree:
    """Which tokens are computed, and how to come from `T` to `U` and back."""

    stretches: list[Stretch]
    token_U: Tensor | None
    """Which token of `T` each one is; None when all are computed, in their order."""
    place_T: Tensor | None
    """The inverse, equal tokens at one place."""
    before_U: Tensor | None
    """Place of the token before; void for the first of a sample. None: the place before."""

    @classmethod
    def of(cls, bounds: Sequence[int], shared: Sequence[int], device: torch.device | str) -> TokenTree:
        """`shared` as in `MicroBatch.shared`; empty to compute every sample whole."""
        if sum(shared) < WORTH * bounds[-1]:
            return cls([Stretch(start, end - start) for start, end in pairwise(bounds)], None, None, None)
        stretches: list[Stretch] = []
        tokens: list[np.ndarray] = []
        before: list[np.ndarray] = []
        place_T = np.empty(bounds[-1], np.int64)

        def add(start: int, end: int, context: Stretch | None) -> Stretch:
            """Tokens `[start, end)` of `T` as a new stretch."""
            first = stretches[-1].start + stretches[-1].length if stretches else 0
            stretch = Stretch(first, end - start, context)
            places = np.arange(first, first + end - start)
            stretches.append(stretch)
            tokens.append(np.arange(start, end))
            place_T[start:end] = places
            before.append(places - 1)
            before[-1][0] = context.start + context.length - 1 if context else first
            return stretch

        prompt: Stretch | None = None
        for start, end, common, next_common in zip(bounds, bounds[1:], shared, [*shared[1:], 0], strict=False):
            if common and prompt is not None:
                assert common == prompt.length  # one prompt, so one length
                place_T[start : start + common] = np.arange(prompt.start, prompt.start + common)
            else:
                prompt = add(start, start + next_common, None) if next_common else None
            add(start + (prompt.length if prompt else 0), end, prompt)
        indices = (np.concatenate(tokens), place_T, np.concatenate(before))
        return cls(stretches, *(torch.from_numpy(index).to(device) for index in indices))

    def computed(self, values_T: Tensor) -> Tensor:
        """`[T, ...]` -> `[U, ...]`."""
        return values_T if self.token_U is None else values_T[self.token_U]

    def spread(self, values_U: Tensor) -> Tensor:
        """`[U, ...]` -> `[T, ...]`; gradients of equal tokens add up."""
        return values_U if self.place_T is None else values_U.index_select(0, self.place_T)

    def predecessors(self, values_U: Tensor) -> Tensor:
        """For each token the row of the one before it, from which it is predicted: `[U, ...]`."""
        return values_U.roll(1, 0) if self.before_U is None else values_U.index_select(0, self.before_U)

    def places(self, start: int, end: int) -> slice | Tensor:
        """Where the tokens `[start, end)` of `T` are among `U`."""
        return slice(start, end) if self.place_T is None else self.place_T[start:end]
