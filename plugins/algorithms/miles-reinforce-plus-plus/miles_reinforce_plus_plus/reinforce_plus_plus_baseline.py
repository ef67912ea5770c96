"""REINFORCE++ with a group baseline: reward above the group's mean, whitened over all tokens of the batch.

    A_t = whiten(R - mean_G - kl_coef KL_t)      arXiv:2501.03262

The group gives the baseline and the batch the scale, where GRPO takes both from the group. Each token pays the KL of
its own, not of what follows it. Samples cut from one trajectory share its reward and count once in `mean_G`; whitening
is over tokens, which cutting does not change.

Whitening is part of the estimator: mean 0 and variance 1 over the trainable tokens of the rollout batch. A mean over
tokens is not a mean over trajectories: where right answers are longer than wrong ones, or the other way round, it is
not 0 before, and a group whose rewards agree gets a small advantage other than 0.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

from torch import Tensor

from miles.api import AdvantageInputs
from miles.toolkit import GroupStatistics, kl_cost, spread_over_samples, whiten


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Tensor:
    """Whitened `R - mean_G - kl_coef KL_t`, `[T]` float32, 0 off the mask."""
    relative_N = inputs.rewards_N.double() - GroupStatistics.of(inputs).mean_N
    relative_T = spread_over_samples(relative_N, inputs.bounds, len(inputs.mask_T))
    return whiten(relative_T - kl_cost(inputs), inputs.mask_T) * inputs.mask_T
