"""Divergence proximal policy optimisation with the binary total variation (DPPO, arXiv:2602.04879).

    L_t = -M_t sg(min(r_t, truncation)) A_t lp_new_t,   r_t = exp(lp_new_t - lp_old_t)

    M_t = 0   where A_t > 0 and p_new_t - p_old_t >  delta_high
              where A_t <= 0 and p_new_t - p_old_t < -delta
    M_t = 1   elsewhere

`|p_new - p_old|` of the drawn token is the total variation between two policies that are asked only: this token, or
another? PPO's ratio cuts a rare token off long before the policy has changed (0.001 to 0.002 is a ratio of 2), and lets
a frequent one go far (0.99 to 0.80 is a ratio of 0.8). As in PPO, what would bring the policy back is never masked.

`_T`: tokens of a micro-batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miles.api import LossInputs, PolicyLoss
from miles.toolkit import bounded_log_ratio
from miles_dppo.plugin import DppoOptions


def dppo_tv(inputs: LossInputs, *, options: DppoOptions) -> PolicyLoss:
    """`[T]`. Metrics: `pg_clipfrac` (masked tokens), of these `pg_clipfrac_low` and `pg_clipfrac_high`; `tv`, the
    total variation; `truncated`; `ppo_kl`; `ratio`."""
    new_T, old_T = inputs.log_probs_T.detach(), inputs.old_log_probs_T
    log_ratio_T = bounded_log_ratio(new_T, old_T)
    ratio_T = log_ratio_T.exp()
    rise_T = probability(new_T) - probability(old_T)
    most = math.inf if options.truncation is None else options.truncation
    up_T = inputs.advantages_T > 0
    high_T = up_T & (rise_T > (options.delta if options.delta_high is None else options.delta_high))
    low_T = ~up_T & (rise_T < -options.delta)
    masked_T = high_T | low_T
    loss_T = -ratio_T.clamp(max=most) * inputs.advantages_T * inputs.log_probs_T
    metrics_T = {
        "pg_clipfrac": masked_T,
        "pg_clipfrac_low": low_T,
        "pg_clipfrac_high": high_T,
        "tv": rise_T.abs(),
        "truncated": ratio_T > most,
        "ppo_kl": -log_ratio_T,
        "ratio": ratio_T,
    }
    return PolicyLoss(torch.where(masked_T, 0.0, loss_T), {name: value.float() for name, value in metrics_T.items()})


def probability(log_probs_T: Tensor) -> Tensor:
    """`[T]`; rounding may leave a log-probability a little above 0."""
    return log_probs_T.clamp(max=0).exp()
