"""How far trainer and rollout are apart on each token and each sample: what every correction starts from.

    l_t = lp_train - lp_rollout     token: l_t     sequence: sum_t l_t     geometric: mean_t l_t

over a sample's trainable tokens. `_T` tokens, `_N` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.api import TrainError
from miles.toolkit import LOG_RATIO_BOUND, mean_per_sample, spread_over_samples, sum_per_sample
from miles_is_corrections.plugin import Level

FAR = 1e4
"""Beyond any log-ratio of two float32 numbers that are probabilities: -inf and inf become this, and can be added."""


@dataclass(frozen=True)
class LogRatios:
    """Log-ratios trainer / rollout of a rollout batch, float64, so that the order of samples is no matter."""

    l_T: Tensor
    """0 on tokens without a loss."""
    trained_T: Tensor
    """Bool: tokens with a loss."""
    bounds: Sequence[int]

    @classmethod
    def of(cls, train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: Sequence[int]) -> LogRatios:
        """Raises TrainError where a trainable token has a log-prob that is not a number."""
        trained_T = mask_T > 0
        l_T = torch.where(trained_T, train_T.double() - rollout_T.double(), 0.0)
        lost = int(l_T.isnan().sum())
        if lost:
            raise TrainError(f"importance ratios: log-probs of {lost} trainable tokens are not numbers (NaN)")
        return cls(l_T.clamp(-FAR, FAR), trained_T, bounds)

    @property
    def samples_N(self) -> Tensor:
        """Bool: samples with a trainable token."""
        return sum_per_sample(self.trained_T.double(), self.bounds) > 0

    def per_sample(self, level: Level) -> Tensor:
        """Log-ratios at level `sequence` or `geometric`, `[N]`."""
        if level == "sequence":
            return sum_per_sample(self.l_T, self.bounds)
        return mean_per_sample(self.l_T, self.trained_T.double(), self.bounds)

    def at(self, level: Level) -> Tensor:
        """Ratios at a level, `[T]`: a sample's on all of its tokens. Log-ratios are clamped to +-20 before `exp`."""
        l_T = self.l_T if level == "token" else self.over_samples(self.per_sample(level))
        return l_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()

    def over_samples(self, values_N: Tensor) -> Tensor:
        """`[T]`: each sample's value on all of its tokens."""
        return spread_over_samples(values_N, self.bounds, len(self.l_T))

    def mean(self, values_T: Tensor) -> float:
        """Over the trainable tokens of the batch; 0 when there is none."""
        return _mean(values_T.double(), self.trained_T)

    def sample_mean(self, values_N: Tensor) -> float:
        """Over the samples with a trainable token; 0 when there is none."""
        return _mean(values_N.double(), self.samples_N)


def _mean(values: Tensor, counted: Tensor) -> float:
    return float(torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1))
