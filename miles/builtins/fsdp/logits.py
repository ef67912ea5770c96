"""Logits on demand: of the tokens that a loss asks for, from hidden states that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from miles.builtins.fsdp.prefixes import TokenTree
from miles.builtins.fsdp.scorer import TokenScorer

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Logits:
    """`(start, end) -> [end - start, V]`, with gradient; where the model is sharded, between its forward and the end of
    its backward."""

    scorer: TokenScorer
    before_UH: Tensor
    tree: TokenTree

    def __call__(self, start: int, end: int) -> Tensor:
        return self.scorer.logits(self.before_UH[self.tree.places(start, end)], self.scorer.lm.get_output_embeddings())


class KeptLogits:
    """The same without gradient, for as long as the head's weights stay what they are. The hidden states wait on the
    CPU: those of a whole step may be many.

    Args:
        head: `kept_head`, one for all micro-batches of a forward.
    """

    def __init__(self, logits: Logits, head: Head):
        self.scorer, self.tree, self.head = logits.scorer, logits.tree, head
        self.device = logits.before_UH.device
        self.before_UH = logits.before_UH.cpu()

    @torch.no_grad()
    def __call__(self, start: int, end: int) -> Tensor:
        places = self.tree.places(start, end)
        before_XH = self.before_UH[places.cpu() if isinstance(places, Tensor) else places]
        return self.scorer.logits(before_XH.to(self.device), self.head)


def kept_head(scorer: TokenScorer) -> Head:
    """What gives logits after the forward, too. Of a sharded model it is a copy, taken while the head is gathered: to
    gather it for each chunk would take all ranks together, and they ask for other chunks."""
    head: nn.Module = scorer.lm.get_output_embeddings()
    if not isinstance(scorer, FSDPModule):
        return head
    weights = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    return lambda before_XH: functional_call(head, weights, (before_XH,))
