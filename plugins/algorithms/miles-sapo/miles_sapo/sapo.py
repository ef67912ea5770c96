"""Soft adaptive policy optimisation (SAPO, arXiv:2511.20347): a smooth gate where PPO clips.

    L_t = -f(r_t) A_t,   f(r) = 4/tau sigmoid(tau (r - 1)),   r_t = exp(lp_new_t - lp_old_t)

with `tau = tau_pos` where `A_t > 0` and `tau_neg` elsewhere. `f'(1) = 1`, so that on-policy this is the policy
gradient; away from 1 the gradient `4 p (1 - p) r A`, `p = sigmoid(tau (r - 1))`, fades instead of being cut.

`_T`: tokens of a micro-batch.
"""

from __future__ import annotations

import torch

from miles.api import LossInputs, PolicyLoss
from miles.toolkit import bounded_log_ratio
from miles_sapo.plugin import SapoOptions


def sapo(inputs: LossInputs, *, options: SapoOptions) -> PolicyLoss:
    """`[T]`. Metrics: `gate`, the weight `4 p (1 - p)` that is left of a token's gradient, 1 on-policy; `ppo_kl`;
    `ratio`."""
    log_ratio_T = bounded_log_ratio(inputs.log_probs_T, inputs.old_log_probs_T)
    ratio_T = log_ratio_T.exp()
    tau_T = torch.where(inputs.advantages_T > 0, options.tau_pos, options.tau_neg)
    open_T = torch.sigmoid(tau_T * (ratio_T - 1))
    gate_T = (4 * open_T * (1 - open_T)).detach()
    metrics_T = {"gate": gate_T, "ppo_kl": -log_ratio_T.detach(), "ratio": ratio_T.detach()}
    return PolicyLoss(-4 / tau_T * open_T * inputs.advantages_T, metrics_T)
