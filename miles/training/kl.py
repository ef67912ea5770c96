"""Estimators of the KL divergence from per-token log-probabilities (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLType = Literal["k1", "k2", "k3", "low_var_kl"]


def kl_estimate(log_probs_T: Tensor, ref_log_probs_T: Tensor, kind: KLType) -> Tensor:
    """Per-token estimate of KL(policy || reference), `[T]`, from samples of the policy.

    With `l = log_probs - ref_log_probs`: k1 = `l`, k2 = `l^2 / 2`, k3 = `exp(-l) - 1 + l`, and low_var_kl = k3 with its
    result clamped to +-10. Log-ratios are clamped to +-20 before they are exponentiated.
    """
    ratio_T = log_probs_T - ref_log_probs_T
    if kind == "k1":
        return ratio_T
    if kind == "k2":
        return ratio_T.square() / 2
    ratio_T = ratio_T.clamp(-20, 20)
    k3_T = (-ratio_T).exp() - 1 + ratio_T
    return k3_T.clamp(-10, 10) if kind == "low_var_kl" else k3_T
