"""Statistics of a rollout batch that estimators share: of groups, of the whole batch.

`_N` samples, `_U` trajectories, `_P` prompts (groups), `_T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.types import AdvantageInputs


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of each sample's group over its trajectories, float64, so that the order of samples is no matter.

    Samples cut from one trajectory share its reward and count once.
    """

    mean_N: Tensor
    std_N: Tensor
    """Unbiased; 0 in a group of one and exactly 0 when its rewards agree."""
    count_N: Tensor
    """Trajectories in the group."""

    @classmethod
    def of(cls, inputs: AdvantageInputs) -> GroupStatistics:
        if not len(inputs.rewards_N):
            nothing = torch.zeros(0, dtype=torch.float64)
            return cls(nothing, nothing, nothing)
        group_N = torch.unique(inputs.group_N, return_inverse=True)[1]
        trajectory_N = torch.unique(inputs.rollout_N, return_inverse=True)[1]
        trajectories, groups = int(trajectory_N.max()) + 1, int(group_N.max()) + 1
        rewards_U = inputs.rewards_N.new_zeros(trajectories, dtype=torch.float64)
        rewards_U[trajectory_N] = inputs.rewards_N.double()
        group_U = group_N.new_zeros(trajectories)
        group_U[trajectory_N] = group_N

        def over_groups(values_U: Tensor) -> Tensor:
            return values_U.new_zeros(groups).index_add_(0, group_U, values_U)

        count_P = over_groups(torch.ones_like(rewards_U))
        mean_P = over_groups(rewards_U) / count_P
        variance_P = over_groups((rewards_U - mean_P[group_U]) ** 2) / (count_P - 1).clamp(min=1)
        low_P = rewards_U.new_full((groups,), torch.inf).scatter_reduce_(0, group_U, rewards_U, "amin")
        high_P = rewards_U.new_full((groups,), -torch.inf).scatter_reduce_(0, group_U, rewards_U, "amax")
        std_P = torch.where(low_P == high_P, 0.0, variance_P.sqrt())
        return cls(mean_P[group_N], std_P[group_N], count_P[group_N])


def per_token(values_N: Tensor, inputs: AdvantageInputs) -> Tensor:
    """One value a sample, `[N]`, on each of its trainable tokens and 0 elsewhere: `[T]`, float32."""
    lengths_N = torch.tensor(inputs.bounds).diff()
    return torch.repeat_interleave(values_N.float(), lengths_N) * inputs.mask_T


def whiten(values_T: Tensor, mask_T: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Zero mean and unit (Bessel-corrected) variance over the trainable tokens of the batch; `[T]`, float32."""
    values_T = torch.where(mask_T > 0, values_T.double(), 0.0)
    weights_T = mask_T.double()
    count = weights_T.sum()
    mean = (values_T * weights_T).sum() / count.clamp(min=1)
    variance = ((values_T - mean).square() * weights_T).sum() / (count - 1).clamp(min=1)
    return ((values_T - mean) * (variance + epsilon).rsqrt()).float()
