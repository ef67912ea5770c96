"""When parameters are gathered and gradients reduced in the course of an optimizer step.

layer   each layer gathers its parameters when it is used and frees them again, and reduces its gradients at the end
        of each backward. Memory: two layers. This is ZeRO-3.
step    each layer gathers its parameters once and keeps them until its last backward of the step; gradients add up
        where they are computed, in float32, and are reduced once. Memory: the whole model and its gradients.
auto    `step` where these two take at most a quarter of the device's memory, so that most is left for activations,
        until memory runs out on some rank; `layer` otherwise and from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from miles.builtins.fsdp.keeping_step import Ranks

T = TypeVar("T")
SHARE = 0.25
"""Of a device's memory that `auto` gives to whole parameters and gradients."""
GRADIENT = 4
"""Bytes: float32."""


class Accumulation:
    """One model's. A model that is not sharded communicates nothing."""

    def __init__(self, ranks: Ranks, mode: Literal["auto", "layer", "step"], dtype: torch.dtype, device: torch.device):
        self.ranks = ranks
        self.adapts = mode == "auto"
        fits = mode == "step" or (self.adapts and _bytes_whole(ranks.module, dtype) <= SHARE * _memory(device))
        self.by_step = ranks.several and ranks.sum(not fits) == 0  # ranks whose memory differs do the same
        self._last = True
        if self.by_step:
            self._root.set_reshard_after_forward(False)

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.ranks.module, FSDPModule)
        return self.ranks.module

    def over(self, batches: Sequence[T]) -> Iterator[T]:
        """The micro-batches of an optimizer step, one by one."""
        for index, batch in enumerate(batches):
            if self.by_step:
                self._last = index == len(batches) - 1
                self._root.set_requires_gradient_sync(self._last)
                self._root.set_reshard_after_backward(self._last)
            yield batch

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """For a rank that ran out of memory, around each micro-batch to the end of the step: by layer, which the
        others, who go on by step, do not notice. What was gathered and added up whole is in its way no more."""
        if not self.by_step:
            yield
            return
        self._free_layers()
        with self.ranks.collectives.once_a_step(reduces=self._last):
            yield
        self._root.set_reshard_after_forward(False)

    def spare(self) -> None:
        """Memory ran out, on all ranks or on one that the others know of."""
        if self.by_step and self.adapts:
            self.by_step = False
            self._free_layers()

    def _free_layers(self) -> None:
        self._root.set_reshard_after_forward(True)
        self._root.set_reshard_after_forward(False, recurse=False)  # its backward comes next
        self._root.set_requires_gradient_sync(True)
        self._root.set_reshard_after_backward(True)


def _bytes_whole(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() * (dtype.itemsize + GRADIENT * p.requires_grad) for p in module.parameters())


def _memory(device: torch.device) -> float:
    """Bytes that a rank has; ranks on a CPU share its machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
