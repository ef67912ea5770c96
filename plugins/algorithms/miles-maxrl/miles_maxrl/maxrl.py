"""MaxRL: reward above the group's mean, in units of that mean, so that rare successes weigh most.

    A_t = (R - mean_G) / mean_G - kl_coef KL_t      0 instead of the quotient when mean_G is 0      arXiv:2602.02710

Expected reward has the gradient `grad p` in a prompt's rate of success `p`; log-likelihood of success has `grad p / p`.
Dividing by the group's mean estimates the latter, up to the order that the size of the group allows. The derivation is
for rewards of 0 and 1. Other rewards that are not negative keep the quotient between -1 and n - 1, n being the number
of trajectories; with negative ones the mean is no rate of success, and near 0 or below it turns signs around: refused.

The KL penalty is each token's own and stands beside the quotient. Taken off the reward, as other estimators have it, it
would make rewards negative. Samples cut from one trajectory share its reward and count once.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.api import AdvantageInputs, TrainError
from miles.toolkit import GroupStatistics, kl_cost, spread_over_samples


def maxrl(inputs: AdvantageInputs) -> Tensor:
    """`(R - mean_G) / mean_G - kl_coef KL_t`, `[T]` float32, 0 off the mask; without KL exactly 0 in a group of one and
    in one whose rewards agree.

    Raises:
        TrainError: a reward is negative.
    """
    rewards_N = inputs.rewards_N.double()
    _refuse_negative(rewards_N, inputs.rollout_N)
    group = GroupStatistics.of(inputs)
    teaches_N = group.std_N > 0
    relative_N = torch.where(teaches_N, (rewards_N - group.mean_N) / torch.where(teaches_N, group.mean_N, 1.0), 0.0)
    relative_T = spread_over_samples(relative_N, inputs.bounds, len(inputs.mask_T))
    return ((relative_T - kl_cost(inputs)) * inputs.mask_T).float()


def _refuse_negative(rewards_N: Tensor, rollout_N: Tensor) -> None:
    negative_N = rewards_N < 0
    if negative_N.any():
        named = dict(zip(rollout_N[negative_N].tolist(), rewards_N[negative_N].tolist(), strict=True))
        shown = ", ".join(f"{reward:g} of rollout {rollout}" for rollout, reward in list(named.items())[:3])
        raise TrainError(
            f"maxrl divides by a group's mean reward, and {len(named)} rewards are negative, such as {shown}: use "
            "rewards from 0 up (best 0 and 1), or another estimator such as grpo or rloo"
        )
