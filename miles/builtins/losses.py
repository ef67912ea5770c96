"""Policy losses that need nothing but log-probabilities: PPO's clipped surrogate, REINFORCE and SFT.

All are per token; mask, importance corrections and aggregation stay in the core. `_T`: tokens of a micro-batch.
"""

from __future__ import annotations

import torch

from miles.api import LossInputs, PolicyLoss
from miles.builtins.options import PpoClipOptions

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +- this before `exp`, so that no ratio overflows."""


def ppo_clip(inputs: LossInputs, *, options: PpoClipOptions) -> PolicyLoss:
    """PPO's clipped surrogate, with clip-higher and dual clip.

    With `r = exp(lp_new - lp_old)` and advantage `A`:

        L = max(-r A, -clip(r, 1 - eps, 1 + eps_high) A),   and where A < 0   L = min(L, -c A)

    PPO arXiv:1707.06347; dual clip arXiv:1912.09729; clip-higher (DAPO) arXiv:2503.14476.

    Metrics, per token: `pg_clipfrac` (the clip is active), of these `pg_clipfrac_low`, `pg_clipfrac_high` and
    `pg_clipfrac_dual`; `ppo_kl`, the estimate `lp_old - lp_new`; `ratio`.
    """
    advantages_T = inputs.advantages_T
    log_ratio_T = (inputs.log_probs_T - inputs.old_log_probs_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_T = log_ratio_T.exp()
    low, high = 1 - options.eps, 1 + (options.eps if options.eps_high is None else options.eps_high)
    free_T = -ratio_T * advantages_T
    clipped_T = -ratio_T.clamp(low, high) * advantages_T
    loss_T = torch.maximum(free_T, clipped_T)
    active_T = clipped_T > free_T
    metrics_T = {
        "pg_clipfrac": active_T,
        "pg_clipfrac_low": active_T & (ratio_T < low),
        "pg_clipfrac_high": active_T & (ratio_T > high),
        "ppo_kl": -log_ratio_T,
        "ratio": ratio_T,
    }
    if options.eps_clip_c is not None:
        bound_T = -options.eps_clip_c * advantages_T
        dual_T = (advantages_T < 0) & (loss_T > bound_T)
        loss_T = torch.where(dual_T, bound_T, loss_T)
        metrics_T["pg_clipfrac_dual"] = dual_T
    return PolicyLoss(loss_T, {name: value.detach().float() for name, value in metrics_T.items()})


def reinforce(inputs: LossInputs) -> PolicyLoss:
    """The score-function estimator, `-A lp_new` (Williams 1992). On-policy: nothing bounds the step."""
    return PolicyLoss(-inputs.advantages_T * inputs.log_probs_T)


def sft(inputs: LossInputs) -> PolicyLoss:
    """Cross-entropy of the given tokens, `-lp_new`; advantages play no part."""
    return PolicyLoss(-inputs.log_probs_T)
