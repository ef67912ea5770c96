"""Group-relative advantages: how much better a trajectory did than the others that answered the same prompt.

No critic is needed: the group is the baseline. Every trainable token of a trajectory gets the same advantage.

    grpo      A = (R - mean_G) / (std_G + epsilon)     arXiv:2402.03300, unbiased std
    dr_grpo   A =  R - mean_G                          arXiv:2503.20783

Samples cut from one trajectory share its reward and count once in the statistics. A group of one, or one whose
rewards all agree, says nothing about what to prefer: its advantages are exactly 0.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.api import AdvantageInputs
from miles.toolkit import GroupStatistics, per_token
from miles_grpo.plugin import GrpoOptions


def relative(inputs: AdvantageInputs, epsilon: float | None) -> Tensor:
    """Reward minus group mean, divided by `std + epsilon` when there is an epsilon: `[T]`."""
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
