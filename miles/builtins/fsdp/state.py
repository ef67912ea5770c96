"""A backend's state: as files, one a rank, and on or off its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from miles.api import CheckpointError, TrainError, TrainPart
from miles.builtins.fsdp.optimizer import Optimizer
from miles.builtins.parking import Parking

ORDER: tuple[TrainPart, ...] = ("parameters", "optimizer", "gradients")
"""Parts come back in this order, and leave in the other."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_state(file: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
    """This rank's parts of `tensors`, and some numbers, as safetensors."""
    parts = {name: local(tensor.detach()) for name, tensor in tensors.items()}
    held = {name: part.cpu().contiguous() for name, part in parts.items() if part.numel()}
    save_file(held, file, {key: str(value) for key, value in numbers.items()})


@torch.no_grad()
def read_state(
    file: Path, tensors: Mapping[str, Tensor], expect: Mapping[str, int], prefixes: tuple[str, ...] = ("",)
) -> dict[str, int]:
    """Fill `tensors` in place, bit for bit; returns the numbers. Names without one of `prefixes` are passed over.

    Raises:
        CheckpointError: the file is not there, or was written by another layout or another model.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the checkpoint was written with fewer ranks, or is damaged")
    with safe_open(file, framework="pt") as saved:
        numbers = {key: int(value) for key, value in (saved.metadata() or {}).items()}
        for key, value in expect.items():
            if numbers.get(key) != value:
                raise CheckpointError(f"{file} was written with {key}={numbers.get(key)}, this run has {key}={value}")
        held = {name for name, tensor in tensors.items() if local(tensor).numel()}
        there = [name for name in saved.keys() if name.startswith(prefixes)]  # noqa: SIM118 - it is no mapping
        if differing := held.symmetric_difference(there):
            names = ", ".join(sorted(differing)[:5])
            raise CheckpointError(f"{file} is of another model or optimizer: {len(differing)} names differ ({names})")
        for name in sorted(held):
            target, value = local(tensors[name]), saved.get_tensor(name)
            if target.shape != value.shape or target.dtype != value.dtype:
                raise CheckpointError(
                    f"{file}: {name!r} is {value.dtype} {tuple(value.shape)}, here {target.dtype} {tuple(target.shape)}"
                )
            target.copy_(value)
    return numbers


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
