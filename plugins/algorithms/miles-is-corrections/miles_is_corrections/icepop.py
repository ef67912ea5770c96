"""IcePop: token weights, and no say for tokens on which trainer and engine disagree too much.

    w_t = exp(l_t)   where low <= exp(l_t) <= high,   else 0        l_t = lp_train - lp_rollout

Made for mixtures of experts, whose two programs may route one token to different experts: such a token's gradient is
noise, at any weight (arXiv:2510.18855). Dropped tokens keep their place in the denominators of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.api import Correction
from miles_is_corrections.effect import corrected
from miles_is_corrections.plugin import IcePopOptions, bounds_of
from miles_is_corrections.ratios import LogRatios


def icepop(
    train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: Sequence[int], *, options: IcePopOptions
) -> Correction:
    """Token weights, 0 outside the bounds."""
    ratios = LogRatios.of(train_T, rollout_T, mask_T, bounds)
    ratio_T = ratios.at("token")
    low, high = bounds_of(options.low, options.high)
    low_T, high_T = ratio_T < low, ratio_T > high
    return corrected(ratios, ratio_T, low_T, high_T, weights_T=torch.where(low_T | high_T, 0.0, ratio_T))
