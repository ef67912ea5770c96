"""Clipped importance-sampling policy optimisation (CISPO, arXiv:2506.13585).

    L_t = -sg(clip(r_t, 1 - eps, 1 + eps_high)) A_t lp_new_t,   r_t = exp(lp_new_t - lp_old_t)

PPO's clip takes a token out of the gradient once its ratio has left the bounds, and the first to leave are the rare
tokens at which reasoning turns. Here the weight is clipped instead, and every token keeps its gradient. `sg` stops the
gradient; `eps: null` is no lower bound.

`_T`: tokens of a micro-batch.
"""

from __future__ import annotations

from miles.api import LossInputs, PolicyLoss
from miles.toolkit import bounded_log_ratio
from miles_cispo.plugin import CispoOptions


def cispo(inputs: LossInputs, *, options: CispoOptions) -> PolicyLoss:
    """`[T]`. Metrics: `pg_clipfrac` (weights that are clipped), `pg_clipfrac_low`, `pg_clipfrac_high`, `ppo_kl`,
    `ratio` before the clip."""
    log_ratio_T = bounded_log_ratio(inputs.log_probs_T, inputs.old_log_probs_T).detach()
    ratio_T = log_ratio_T.exp()
    low, high = 0.0 if options.eps is None else 1 - options.eps, 1 + options.eps_high
    loss_T = -ratio_T.clamp(low, high) * inputs.advantages_T * inputs.log_probs_T
    metrics_T = {
        "pg_clipfrac": (ratio_T < low) | (ratio_T > high),
        "pg_clipfrac_low": ratio_T < low,
        "pg_clipfrac_high": ratio_T > high,
        "ppo_kl": -log_ratio_T,
        "ratio": ratio_T,
    }
    return PolicyLoss(loss_T, {name: value.float() for name, value in metrics_T.items()})
