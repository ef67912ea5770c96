"""Policy losses that need nothing but log-probabilities: PPO's clipped surrogate, REINFORCE and SFT.

All are per token; mask, importance corrections and aggregation stay in the core. `_T`: tokens of a micro-batch.
"""

from __future__ import annotations

from miles.api import LossInputs, PolicyLoss
from miles.builtins.options import PpoClipOptions
from miles.toolkit import bounded_log_ratio, clipped_surrogate


def ppo_clip(inputs: LossInputs, *, options: PpoClipOptions) -> PolicyLoss:
    """PPO's clipped surrogate of `r = exp(lp_new - lp_old)`: see `miles.toolkit.clipped_surrogate`."""
    log_ratio_T = bounded_log_ratio(inputs.log_probs_T, inputs.old_log_probs_T)
    return clipped_surrogate(log_ratio_T, inputs.advantages_T, options.eps, options.eps_high, options.eps_clip_c)


def reinforce(inputs: LossInputs) -> PolicyLoss:
    """The score-function estimator, `-A lp_new` (Williams 1992). On-policy: nothing bounds the step."""
    return PolicyLoss(-inputs.advantages_T * inputs.log_probs_T)


def sft(inputs: LossInputs) -> PolicyLoss:
    """Cross-entropy of the given tokens, `-lp_new`; advantages play no part."""
    return PolicyLoss(-inputs.log_probs_T)
