"""REINFORCE with a leave-one-out baseline: how much better a trajectory did than the mean of the others of its prompt.

    A_i = R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean_G)     arXiv:2402.14740

The baseline of a trajectory does not contain its own reward, so the policy gradient is unbiased; with `mean_G` it is
too small by the factor `(n - 1) / n`. `n` counts trajectories: samples cut from one share its reward and count once.
A group of one has no others: its advantage is 0.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.api import AdvantageInputs
from miles.toolkit import GroupStatistics, per_token


def rloo(inputs: AdvantageInputs) -> Tensor:
    """`n / (n - 1) (R - mean_G)`, `[T]`; exactly 0 in a group of one and in one whose rewards agree."""
    group = GroupStatistics.of(inputs)
    scale_N = group.count_N / (group.count_N - 1).clamp(min=1)
    advantages_N = scale_N * (inputs.rewards_N.double() - group.mean_N)
    return per_token(torch.where(group.std_N > 0, advantages_N, 0.0), inputs)
