"""Gradients that do not depend on how many ranks computed them.

Floating-point sums depend on their order, and the order on the number of ranks. The gradients of micro-batches have 24
bits or fewer; float64 adds a few hundred of them without rounding while they lie within a factor of 2^20 or so of each
other, and beyond that its error all but vanishes when the sum is rounded to float32. So each micro-batch's gradient is
added in float64, over ranks as over micro-batches, and `.grad` is that sum, rounded once.

The memory of this is 8 bytes a parameter, shared by the ranks.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from miles.api import TrainError
from miles.builtins.fsdp.keeping_step import sharded_together


class ExactSums:
    """Running sums of one model's gradients since `clear`."""

    def __init__(self) -> None:
        self.totals: dict[Hashable, Tensor] = {}

    def clear(self) -> None:
        self.totals = {}

    def add(self, key: Hashable, gradient: Tensor) -> Tensor:
        """The sum so far, float64."""
        total = self.totals.get(key)
        if total is None:
            self.totals[key] = gradient.double() if gradient.dtype != torch.float64 else gradient.clone()
        elif total.shape != gradient.shape:
            raise TrainError(
                "a parameter has a gradient in some micro-batches of a step and in others has none; "
                "--reproducible-ranks needs it in all of them"
            )
        else:
            total += gradient
        return self.totals[key]

    def follow(self, module: nn.Module) -> None:
        """Under FSDP2, whose `reduce_dtype` shall be float64: what a unit's reduction gives becomes the sum so far."""
        for members in sharded_together(module):
            own = [parameter for unit in members for parameter in _own_parameters(unit)]
            members[0].set_all_reduce_hook(partial(self._reduced, members[0], own))

    def _reduced(self, unit: nn.Module, own: list[nn.Parameter], reduced: Tensor) -> None:
        for parameter in own:
            parameter.grad = None  # it would be added to what is the sum already
        reduced.copy_(self.add(unit, reduced))


def _own_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """Those of a module that no unit further in shards."""
    inner = {id(p) for m in unit.modules() if m is not unit and isinstance(m, FSDPModule) for p in m.parameters()}
    return [parameter for parameter in unit.parameters() if id(parameter) not in inner]
