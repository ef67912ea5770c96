"""Off-policy sequence masking (OPSM, DeepSeek-V3.2, arXiv:2512.02556).

    M_t = 0   where A_t < 0 and 1/|y| sum_s m_s (lp_old_s - lp_new_s) > delta,   M_t = 1 elsewhere

A model learns most from its own mistakes, and little from those that it would hardly make any more: pushing further
away from a sequence that the policy has left already is what makes training on stale samples unstable.

`_N` samples, `_T` tokens of a micro-batch.
"""

from __future__ import annotations

from torch import Tensor

from miles.api import LossInputs
from miles.toolkit import mean_per_sample, spread_over_samples
from miles_opsm.plugin import OpsmOptions


def opsm(inputs: LossInputs, *, options: OpsmOptions) -> Tensor:
    """`[T]` bool: False on the tokens of negative advantage in sequences whose mean log-ratio old / new is above
    `delta`."""
    left_T = (inputs.old_log_probs_T - inputs.log_probs_T).detach()
    left_N = mean_per_sample(left_T, inputs.mask_T, inputs.bounds)
    return (inputs.advantages_T >= 0) | (spread_over_samples(left_N, inputs.bounds, len(left_T)) <= options.delta)
