"""A backend's state on or off its device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from miles.api import TrainError, TrainPart
from miles.builtins.fsdp.model import local
from miles.builtins.fsdp.optimizer import Optimizer
from miles.builtins.parking import Parking

ORDER: tuple[TrainPart, ...] = ("parameters", "optimizer", "gradients")
"""Parts come back in this order, and leave in the other."""


class Presence:
    """Which parts of a backend are on its device. Moving changes no value; on a CPU it moves nothing but still counts.

    What is away keeps its tensors, which have no memory (`miles.builtins.parking`): parameters that FSDP2 shards, their
    padding included, as those of a plain module.

    Args:
        module: its parameters are the part `parameters`.
        optimizer: masters and moments; None for a frozen model.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | None, device: torch.device):
        self.module = module
        self.optimizer = optimizer
        self.moves = device.type == "cuda"
        self.away: set[TrainPart] = set()
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._parking = {part: Parking() for part in ORDER}

    def need(self, *parts: TrainPart) -> None:
        """Raises TrainError when one of these is away."""
        if missing := self.away.intersection(parts):
            raise TrainError(f"{', '.join(sorted(missing))} are offloaded; call onload({sorted(missing)}) first")

    def offload(self, parts: Iterable[TrainPart]) -> None:
        for part in reversed(ORDER):
            if part in parts and part not in self.away:
                if part == "gradients":
                    self._take_gradients()
                if self.moves:
                    self._parking[part].park(local(tensor) for tensor in self._tensors(part))
                self.away.add(part)
        if self.moves and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def onload(self, parts: Iterable[TrainPart]) -> None:
        for part in ORDER:
            if part in parts and part in self.away:
                self._parking[part].bring_back()
                if part == "gradients":
                    self._return_gradients()
                self.away.discard(part)

    def _tensors(self, part: TrainPart) -> list[Tensor]:
        if part == "parameters":
            return list(self.module.parameters())
        if part == "gradients":
            sums = self.optimizer.sums.totals.values() if self.optimizer and self.optimizer.sums else ()
            return [*(gradient for _, gradient in self._gradients), *sums]
        return [t for name, t in self.optimizer.tensors().items() if name != "steps"] if self.optimizer else []

    def _take_gradients(self) -> None:
        """Those that are away are kept here: a backward must not add to them."""
        owners = list(self.module.parameters())
        if self.optimizer is not None:
            owners += [m for name, m in self.optimizer.masters.items() if m is not self.optimizer.parameters[name]]
        self._gradients = [(owner, owner.grad) for owner in owners if owner.grad is not None]
        for owner, _ in self._gradients:
            owner.grad = None

    def _return_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []
