"""What a correction hands to the core, and the metrics by which every correction says what it did.

All are over the trainable tokens of the rollout batch. `w` is what multiplies a token's loss: its weight, 0 where it is
rejected. `_T` tokens.

| metric | |
|---|---|
| `is/ratio_mean` | mean of the ratio trainer / rollout before anything was done to it; 1 but for noise |
| `is/weight_mean`, `is/weight_max` | of `w` |
| `is/effective_sample_size` | `(sum w)^2 / (n sum w^2)`: 1 when all count alike, 1/n when one counts |
| `is/fraction_low`, `is/fraction_high` | tokens whose ratio was beyond a bound |
| `is/fraction_rejected` | tokens with `w = 0` |
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.api import Correction, Metrics
from miles_is_corrections.ratios import LogRatios


def corrected(
    ratios: LogRatios,
    ratio_T: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    weights_T: Tensor | None = None,
    keep_T: Tensor | None = None,
    more: Metrics | None = None,
) -> Correction:
    """The correction, with its metrics; tokens without a loss get weight 1 and are kept.

    Args:
        ratio_T: before anything was done to it.
        low_T, high_T: bool, tokens beyond a bound.
        weights_T: None for a correction that only rejects.
        keep_T: bool; None for one that only weights.
        more: metrics of its own.
    """
    w_T = torch.ones_like(ratio_T) if weights_T is None else weights_T
    w_T = torch.where(ratios.trained_T, w_T if keep_T is None else w_T * keep_T, 0.0)
    count, total, squares = int(ratios.trained_T.sum()), float(w_T.sum()), float(w_T.square().sum())
    metrics = {
        "is/ratio_mean": ratios.mean(ratio_T),
        "is/weight_mean": total / max(count, 1),
        "is/weight_max": float(w_T.max()) if count else 0.0,
        "is/effective_sample_size": total**2 / (count * squares) if squares else 0.0,
        "is/fraction_low": ratios.mean(low_T),
        "is/fraction_high": ratios.mean(high_T),
        "is/fraction_rejected": ratios.mean(w_T == 0),
    }
    return Correction(
        weights_T=None if weights_T is None else torch.where(ratios.trained_T, weights_T, 1.0).float().detach(),
        keep_T=None if keep_T is None else (keep_T | ~ratios.trained_T).float(),
        metrics={**metrics, **(more or {})},
    )
