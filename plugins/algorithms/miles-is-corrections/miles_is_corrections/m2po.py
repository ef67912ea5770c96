"""M2PO: drop as few tokens as it takes for the second moment of the log-ratio to be small.

    l_t = lp_train - lp_rollout     keep the most tokens, those of smallest l_t^2, with   mean(l_t^2) < threshold

Bounds on each token's ratio drop many tokens from stale data, and among them those that teach most, because rare tokens
move fastest. The mean bounds what those tokens do together instead (arXiv:2510.01161). Nothing is weighted.

When no token is below the threshold, the one of smallest `l^2` is kept. Tokens that tie at the cut go together, so
that the order of samples is no matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.api import Correction
from miles_is_corrections.effect import corrected
from miles_is_corrections.plugin import M2poOptions
from miles_is_corrections.ratios import LogRatios


def m2po(
    train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: Sequence[int], *, options: M2poOptions
) -> Correction:
    """A keep mask over the whole batch; with it, the second moment before and after."""
    ratios = LogRatios.of(train_T, rollout_T, mask_T, bounds)
    moment_T = ratios.l_T.square()
    keep_T = moment_T <= cut(moment_T[ratios.trained_T], options.threshold)
    dropped_T = ratios.trained_T & ~keep_T
    more = {
        "is/second_moment": ratios.mean(moment_T),
        "is/second_moment_kept": ratios.mean(moment_T * keep_T) / max(ratios.mean(keep_T), 1e-12),
    }
    low_T, high_T = dropped_T & (ratios.l_T < 0), dropped_T & (ratios.l_T > 0)
    return corrected(ratios, ratios.at("token"), low_T, high_T, keep_T=keep_T, more=more)


def cut(moments: Tensor, threshold: float) -> float:
    """The largest of some non-negative numbers that may stay: the mean of those up to it is below the threshold."""
    if not len(moments):
        return 0.0
    ascending = moments.sort().values
    means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=ascending.device)
    kept = int((means < threshold).sum())  # means of ascending numbers ascend
    if kept == len(ascending):
        return float(ascending[-1])
    below = ascending[ascending < ascending[kept]]
    return float(below[-1] if len(below) else ascending[0])
