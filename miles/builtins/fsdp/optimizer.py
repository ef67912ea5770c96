"""AdamW over float32 parameters: those of the model, or master copies of its bfloat16 ones.

Which of the two depends on where float32 lives. In fp32, and under FSDP2 (whose sharded parameters are float32 and are
lowered when they are gathered), the optimizer works on the model's own parameters. One rank in bf16 holds bfloat16
parameters and here their masters: the gradient of each micro-batch is added in float32 as soon as it exists and
the bfloat16 one is dropped; after a step the parameters are the masters, rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from miles.api import StepReport
from miles.builtins.fsdp.exact_sums import ExactSums
from miles.builtins.fsdp.model import copy_into, local
from miles.builtins.fsdp.schedule import learning_rate
from miles.toolkit import OptimizerSection

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Clipping, AdamW and its schedule. Its state exists from the start: running out of memory for it loses nothing.

    Args:
        parameters: the trainable ones, by name.
        sums: add gradients there; every bit of a step is then the same however parameters are sharded.
        add: to a master's gradient what a micro-batch adds.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        section: OptimizerSection,
        total_steps: int,
        sums: ExactSums | None = None,
        add: Callable[[Tensor, Tensor], object] = Tensor.add_,
    ):
        self.section = section
        self.sums = sums
        self.total_steps = total_steps
        self.taken = torch.zeros((), dtype=torch.int64)
        """Steps taken, on the CPU; skipped ones do not count."""
        self.parameters = dict(parameters)
        self.masters = {name: _master(parameter, sums, add) for name, parameter in parameters.items()}
        self._master_of = {id(parameter): self.masters[name] for name, parameter in parameters.items()}
        matrices = [master for master in self.masters.values() if master.ndim >= 2]
        others = [master for master in self.masters.values() if master.ndim < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            # On a CPU the fused one rounds the last few elements of a tensor in another way than the others.
            fused=sums is None or all(master.is_cuda for master in others + matrices),
            foreach=False,
        )
        for master in self.masters.values():
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    @property
    def steps(self) -> int:
        return int(self.taken)

    def write(self, tensor: Tensor, full: Tensor) -> None:
        """Fill a tensor of the model, and its master with what rounding would lose."""
        copy_into(tensor, full)
        master = self._master_of.get(id(tensor), tensor)
        if master is not tensor:
            copy_into(master, full)

    def zero_grad(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None
        if self.sums is not None:
            self.sums.clear()

    def measure(self) -> Tensor:
        """Sum of the squares of this rank's part of the gradient, in float64. Communicates nothing; needs memory."""
        for master in self.masters.values():
            if self.sums is not None and master in self.sums.totals:
                master.grad = self.sums.totals[master].to(master.dtype)
        norms = torch._foreach_norm([part for part in self._gradients() if part.numel()], 2.0, torch.float64)
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)

    def step(self, loss_total: Tensor, squares: Tensor | None = None) -> StepReport:
        """Clip and step, unless the gradient or a loss is not finite on any rank.

        Args:
            loss_total: sum of this rank's losses since `zero_grad`, to see whether they were finite.
            squares: what `measure` says, where it was asked already.
        """
        rate = learning_rate(self.steps, self.section, self.total_steps)
        if squares is None:
            squares = self.measure()
        totals = torch.stack([squares.to(loss_total.device), loss_total.double()])
        if any(isinstance(parameter, DTensor) for parameter in self.parameters.values()):
            dist.all_reduce(totals)
        total, loss = totals.tolist()
        grad_norm = float(np.sqrt(total))
        if self.sums is not None:
            grad_norm = float(np.float32(grad_norm))  # without the last bits, which depend on the order of ranks
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            return StepReport(grad_norm, skipped=True, learning_rate=rate)
        if self.section.clip_grad and (scale := self.section.clip_grad / (grad_norm + 1e-6)) < 1:
            torch._foreach_mul_(self._gradients(), scale)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.taken += 1
        self.round_masters()
        return StepReport(grad_norm, skipped=False, learning_rate=rate)

    def _gradients(self) -> list[Tensor]:
        return [local(master.grad) for master in self.masters.values() if master.grad is not None]

    @torch.no_grad()
    def round_masters(self) -> None:
        """Parameters follow their masters."""
        pairs = [(self.parameters[name], m) for name, m in self.masters.items() if m is not self.parameters[name]]
        if pairs:
            parameters, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(parameters), list(masters))

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, `<kind>/<parameter>`, and `steps`: what a checkpoint holds of it. A master is
        called `parameter/<name>`, since it is what the parameter is in float32."""
        state = {
            f"{key}/{name}": self.adamw.state[master][key]
            for name, master in self.masters.items()
            for key in ("step", *MOMENTS)
        }
        masters = {f"parameter/{name}": m for name, m in self.masters.items() if m is not self.parameters[name]}
        return {**state, **masters, "steps": self.taken}


def _master(parameter: nn.Parameter, sums: ExactSums | None, add: Callable[[Tensor, Tensor], object]) -> nn.Parameter:
    """The parameter itself, or a float32 copy of a narrower one, that collects its gradients."""
    narrow = parameter.dtype in (torch.bfloat16, torch.float16)
    master = nn.Parameter(parameter.detach().float()) if narrow else parameter

    def collect(computed: Tensor) -> None:
        gradient, computed.grad = computed.grad, None
        assert gradient is not None
        if sums is not None:
            sums.add(master, gradient)
        elif master.grad is None:
            master.grad = gradient.float()
        else:
            add(master.grad, gradient)

    if narrow or (sums is not None and not isinstance(parameter, DTensor)):
        parameter.register_post_accumulate_grad_hook(collect)
    return master
