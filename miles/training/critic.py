"""The critic's half of training: its loss, and how well it predicts.

A critic says what each state is worth (`Outputs.values_T`). An estimator turns values into advantages, and says with
its `returns_T` what they should have been; the critic learns that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.training.objective import Loss, weighted
from miles.types import LossResult, MicroBatch, Outputs


def value_loss(values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Per token: half the squared error, with a move of more than `clip` from the old value not paying off, and whether
    that was so. `L = max((V_old + clamp(V - V_old, +-clip) - ret)^2, (V - ret)^2) / 2`; PPO, arXiv:1707.06347."""
    free_T = (values_T - returns_T).square()
    if clip is None:
        return free_T / 2, torch.zeros_like(free_T)
    near_T = values_T.clamp(old_values_T - clip, old_values_T + clip)  # what has not moved far stays the same number
    clipped_T = (near_T - returns_T).square()
    return clipped_T.maximum(free_T) / 2, (clipped_T > free_T).float()


class ValueObjective(Loss):
    """`LossFunction` for a critic. Columns: `mask`, `weights`, `values` (before the update), `returns`."""

    def __init__(self, clip: float | None):
        super().__init__()
        self.clip = clip

    def __call__(self, batch: MicroBatch, outputs: Outputs) -> LossResult:
        assert outputs.values_T is not None
        columns = batch.columns
        loss_T, clipped_T = value_loss(outputs.values_T, columns["values"], columns["returns"], self.clip)
        loss = weighted(loss_T, columns["weights"])
        sums = {
            "critic/value_loss": loss.detach(),
            "critic/value_clipfrac": self.token_mean(clipped_T, columns["mask"]),
        }
        return LossResult(loss, sums)


def explained_variance(values_T: Tensor, returns_T: Tensor, mask_T: Tensor) -> float:
    """`1 - Var(returns - values) / Var(returns)` over trainable tokens: 1 for a perfect critic, 0 for one that always
    says the same, and where all returns agree."""
    trained_T = mask_T > 0
    returns_T, errors_T = returns_T[trained_T].double(), (returns_T - values_T)[trained_T].double()
    spread = float(returns_T.var(correction=0)) if len(returns_T) else 0.0
    return 1 - float(errors_T.var(correction=0)) / spread if spread else 0.0
