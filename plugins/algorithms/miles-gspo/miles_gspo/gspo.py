"""Group sequence policy optimisation (arXiv:2507.18071): PPO's clipped surrogate of one ratio for a whole sequence.

    s = exp(1/|y| sum_t m_t (lp_new_t - lp_old_t)),   L_t = max(-s A_t, -clip(s, 1 - eps, 1 + eps_high) A_t)

A reward belongs to a sequence, so its importance weight does too; the length in the exponent keeps the ratios of short
and long sequences on one scale. The gradient flows through the mean: every trainable token of a sequence gets an equal
part of it, or none where the sequence is clipped.

`_N` samples, `_T` tokens of a micro-batch.
"""

from __future__ import annotations

from miles.api import LossInputs, PolicyLoss
from miles.toolkit import LOG_RATIO_BOUND, clipped_surrogate, mean_per_sample, spread_over_samples
from miles_gspo.plugin import GspoOptions


def gspo(inputs: LossInputs, *, options: GspoOptions) -> PolicyLoss:
    """`[T]`: the surrogate of a token's sequence. Metrics as in `miles.toolkit.clipped_surrogate`, of sequence ratios.

    What is clamped before `exp` is the sequence's log-ratio: clamping tokens before the mean would change the ratio of
    sequences that are within bounds, and cut the gradient of single tokens out of a sequence that is not clipped.
    """
    shift_T = inputs.log_probs_T - inputs.old_log_probs_T
    log_ratio_N = mean_per_sample(shift_T, inputs.mask_T, inputs.bounds).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio_T = spread_over_samples(log_ratio_N, inputs.bounds, len(shift_T))
    return clipped_surrogate(log_ratio_T, inputs.advantages_T, options.eps, options.eps_high, options.eps_clip_c)
