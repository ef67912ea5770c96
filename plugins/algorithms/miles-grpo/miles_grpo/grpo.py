"""Group-relative advantages: how much better a trajectory did than the others that answered the same prompt.

No critic is needed: the group is the baseline. Every trainable token of a trajectory gets the same advantage.

    grpo      A = (R - mean_G) / (std_G + epsilon)     arXiv:2402.03300, unbiased std
    dr_grpo   A =  R - mean_G                          arXiv:2503.20783

Samples cut from one trajectory share its reward and count once in the statistics. A group of one, or one whose
rewards all agree, says nothing about what to prefer: its advantages are exactly 0.

`_N` samples, `_U` trajectories, `_P` prompts (groups), `_T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.api import AdvantageInputs
from miles_grpo.plugin import GrpoOptions


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of each sample's group over its trajectories, float64, so that the order of samples is no matter."""

    mean_N: Tensor
    std_N: Tensor
    """Unbiased; 0 in a group of one and exactly 0 when its rewards agree."""
    count_N: Tensor
    """Trajectories in the group."""

    @classmethod
    def of(cls, inputs: AdvantageInputs) -> GroupStatistics:
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


def per_token(advantages_N: Tensor, inputs: AdvantageInputs) -> Tensor:
    """One value a sample, `[N]`, on each of its trainable tokens and 0 elsewhere: `[T]`, float32."""
    lengths_N = torch.tensor(inputs.bounds).diff()
    return torch.repeat_interleave(advantages_N.float(), lengths_N) * inputs.mask_T


def relative(inputs: AdvantageInputs, epsilon: float | None) -> Tensor:
    """Reward minus group mean, divided by `std + epsilon` when there is an epsilon: `[T]`."""
    if not len(inputs.rewards_N):
        return torch.zeros_like(inputs.mask_T)
    group = GroupStatistics.of(inputs)
    advantages_N = inputs.rewards_N.double() - group.mean_N
    if epsilon is not None:
        advantages_N = advantages_N / (group.std_N + epsilon)
    return per_token(torch.where(group.std_N > 0, advantages_N, 0.0), inputs)


def grpo(inputs: AdvantageInputs, *, options: GrpoOptions) -> Tensor:
    """`(R - mean_G) / (std_G + epsilon)`, `[T]`; 0 in a group whose rewards agree."""
    return relative(inputs, options.epsilon if options.normalize_std else None)


def dr_grpo(inputs: AdvantageInputs) -> Tensor:
    """`R - mean_G`, `[T]`. For loss aggregation `constant`, which divides no sample by its length."""
    return relative(inputs, None)
