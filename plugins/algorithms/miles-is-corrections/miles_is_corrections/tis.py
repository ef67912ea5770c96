"""Truncated importance sampling: each token's loss is weighted by how much likelier the trainer finds the token than
the engine did, within bounds.

    w_t = clip(exp(lp_train - lp_rollout), low, high)

Unbiased without bounds, and then of any variance; the upper bound trades variance for bias (Ionides, Truncated
Importance Sampling, 2008). For RL of language models: Yao et al. 2025, Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from miles.api import Correction
from miles_is_corrections.effect import corrected
from miles_is_corrections.plugin import TisOptions, bounds_of
from miles_is_corrections.ratios import LogRatios


def tis(
    train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: Sequence[int], *, options: TisOptions
) -> Correction:
    """Clipped token weights."""
    ratios = LogRatios.of(train_T, rollout_T, mask_T, bounds)
    ratio_T = ratios.at("token")
    low, high = bounds_of(options.low, options.high)
    return corrected(ratios, ratio_T, ratio_T < low, ratio_T > high, weights_T=ratio_T.clamp(low, high))
