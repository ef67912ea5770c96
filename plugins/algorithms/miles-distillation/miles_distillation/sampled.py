"""On-policy distillation on the tokens that were sampled (arXiv:2306.08543).

    A_t = -coef * (lp_student_t - lp_teacher_t)

`lp_student` are the old log-probs, those of the policy before this batch's updates. On the policy's own samples the
mean of `(lp_student - lp_teacher) * d lp_student` is the exact gradient of KL(student, teacher) of the next token,
given what was written so far. What a token does to the tokens after it is left out: the discount is 0.

One log-probability a token is all it asks of a teacher, so that any server that scores will do. As a term it is added
to an estimator; as the estimator itself it distils, and no reward is needed.

`_T` tokens.
"""

from __future__ import annotations

import torch

from miles.api import AdvantageInputs, Advantages
from miles_distillation.divergences import LEAST
from miles_distillation.plugin import DistillationOptions


def distillation(inputs: AdvantageInputs, *, options: DistillationOptions) -> Advantages:
    """`-coef * (lp_student - lp_teacher)`, `[T]`, 0 where the mask is. A teacher's log-probs count from `LEAST` up."""
    assert inputs.old_log_probs_T is not None
    assert inputs.teacher_log_probs_T is not None
    log_ratio_T = inputs.old_log_probs_T.float() - inputs.teacher_log_probs_T.float().clamp(min=LEAST)
    log_ratio_T = torch.where(inputs.mask_T > 0, log_ratio_T, 0.0)
    mean = float(log_ratio_T.sum() / inputs.mask_T.sum().clamp(min=1))
    return Advantages(-options.coef * log_ratio_T, metrics={"train/distill_sampled_kl": mean})
