"""How far the trainer and the rollout engine disagree about the same tokens.

The same weights give different log-probabilities in two programs (kernels, precision, expert routing), and older
weights more so. Policy gradients then are biased; these metrics say how much. They are only ever computed from a
forward pass of the trainer, never by comparing a tensor with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from miles.training.kl import kl_estimate
from miles.training.table import Table
from miles.types import ROLLOUT_LOG_PROBS, Metrics

PREFIX = "train/train_rollout"


def mismatch_terms(train_T: Tensor, rollout_T: Tensor) -> dict[str, Tensor]:
    """Per-token terms `[T]` whose means over trainable tokens `mismatch_metrics` turns into metrics."""
    ratio_T = (train_T - rollout_T).clamp(-20, 20).exp()
    return {
        "abs_diff": (train_T - rollout_T).abs(),
        "k3": kl_estimate(rollout_T, train_T, "k3"),
        "ratio_squared": ratio_T.square(),
        "train_nll": -train_T,
        "rollout_nll": -rollout_T,
    }


def mismatch_weights(table: Table) -> Tensor | None:
    """`[T]`: with these, terms of the mismatch add up to their means over the trainable tokens of samples that have
    rollout log-probs. None where there are none."""
    if not table.has(ROLLOUT_LOG_PROBS.name):
        return None
    present_T = table.present[ROLLOUT_LOG_PROBS.name].repeat_interleave(torch.tensor(table.lengths))
    mask_T = table.flat("mask") * present_T
    return mask_T / mask_T.sum() if mask_T.any() else None


def mismatch_metrics(means: Mapping[str, float]) -> Metrics:
    """Metrics from the means of `mismatch_terms` over all trainable tokens."""
    return {
        f"{PREFIX}_logprob_abs_diff": means["abs_diff"],
        f"{PREFIX}_kl": means["k3"],
        f"{PREFIX}_chi2": means["ratio_squared"] - 1,
        "train/ppl": _exp(means["train_nll"]),
        "rollout/ppl": _exp(means["rollout_nll"]),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 80.0))
