"""A backend's state on or off its device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from miles.api import TrainError, TrainPart
from miles.builtins.fsdp.model import local
from miles.builtins.fsdp.optimizer import Optimizer
from miles.builtins.parking import Parking

ORDER: tuple[TrainPart, ...] = ("parameters", "optimizer", "gradients")
"""Parts come back in this order, and leave in the other."""


class Placement:
    """Which parts of a backend are on its device. Moving changes no value; on a CPU it moves nothing but still counts.

    Args:
        module: its parameters are the part `parameters`.
        optimizer: masters and moments; None for a frozen model.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | None, device: torch.device):
        self.module = module
        self.optimizer = optimizer
        self.device = device
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
                self._move(part, torch.device("cpu"), away=True)
                self.away.add(part)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def onload(self, parts: Iterable[TrainPart]) -> None:
        for part in ORDER:
            if part in parts and part in self.away:
                self._move(part, self.device, away=False)
                self.away.discard(part)

    def _move(self, part: TrainPart, device: torch.device, away: bool) -> None:
        if part == "gradients":
            (self._park_gradients if away else self._return_gradients)(device)
        elif part == "parameters" and isinstance(self.module, FSDPModule):
            self.module.to(device)
        elif self.device.type == "cuda":
            if away:
                self._parking[part].park(self._tensors(part))
            else:
                self._parking[part].bring_back()

    def _tensors(self, part: TrainPart) -> list[Tensor]:
        if part == "parameters":
            return list(self.module.parameters())
        return [local(t) for t in self.optimizer.tensors().values() if t.is_cuda] if self.optimizer else []

    def _park_gradients(self, device: torch.device) -> None:
        """A gradient may not live elsewhere than its parameter, so those that are away are kept here."""
        owners = list(self.module.parameters())
        if self.optimizer is not None:
            owners += [m for name, m in self.optimizer.masters.items() if m is not self.optimizer.parameters[name]]
        self._gradients = [(owner, owner.grad.to(device)) for owner in owners if owner.grad is not None]
        for owner, _ in self._gradients:
            owner.grad = None

    def _return_gradients(self, device: torch.device) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient.to(device)
        self._gradients = []
