"""What policy losses have in common: a ratio that cannot overflow, and PPO's clipped surrogate of it."""

from __future__ import annotations

import torch
from torch import Tensor

from miles.types import PolicyLoss

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +- this before `exp`, so that no ratio overflows."""


def bounded_log_ratio(new_T: Tensor, old_T: Tensor) -> Tensor:
    """`new - old`, clamped to what `exp` can take; `[T]`. A clamped entry has no gradient."""
    return (new_T - old_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    eps: float,
    eps_high: float | None = None,
    eps_clip_c: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate of any ratio `r = exp(log_ratio)`, with clip-higher and dual clip:

        L = max(-r A, -clip(r, 1 - eps, 1 + eps_high) A),   and where A < 0   L = min(L, -c A)

    PPO arXiv:1707.06347; dual clip arXiv:1912.09729; clip-higher (DAPO) arXiv:2503.14476.

    Args:
        log_ratio_T: `[T]`, bounded (`bounded_log_ratio`); the gradient flows through it.
        eps_high: `eps` when None.
        eps_clip_c: above 1; None for no dual clip.

    Metrics, per token: `pg_clipfrac` (the clip is active), of these `pg_clipfrac_low`, `pg_clipfrac_high` and
    `pg_clipfrac_dual`; `ppo_kl`, the estimate `lp_old - lp_new`; `ratio`.
    """
    ratio_T = log_ratio_T.exp()
    low, high = 1 - eps, 1 + (eps if eps_high is None else eps_high)
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
    if eps_clip_c is not None:
        bound_T = -eps_clip_c * advantages_T
        dual_T = (advantages_T < 0) & (loss_T > bound_T)
        loss_T = torch.where(dual_T, bound_T, loss_T)
        metrics_T["pg_clipfrac_dual"] = dual_T
    return PolicyLoss(loss_T, {name: value.detach().float() for name, value in metrics_T.items()})
