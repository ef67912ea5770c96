"""Distillation over the whole vocabulary: the loss of a token is the divergence of student and teacher where it was
drawn (GKD, arXiv:2306.13649; on the policy's own samples its `lambda` is 1).

    loss_t = D(p_student(. | prefix_t), p_teacher(. | prefix_t))        reverse KL, forward KL or Jensen-Shannon

The gradient is exact for this sum, where the sampled-token term `distillation` has one draw of it. Both models' logits
are needed, so the teacher must be local (`teacher.load`). Advantages and rewards play no part.
"""

from __future__ import annotations

from torch import Tensor

from miles.api import LossInputs, PolicyLoss, TrainError
from miles_distillation.divergences import distilled, divergence, fitted
from miles_distillation.plugin import DistillFullOptions


def distill_full(inputs: LossInputs, *, options: DistillFullOptions) -> PolicyLoss:
    """Divergence over the vocabulary, `[T]`, 0 where the mask is; `chunk_size` rows of logits are held at once.

    Raises:
        TrainError: there is no local teacher.
    """
    teacher = inputs.teacher_logits
    assert inputs.outputs is not None
    assert inputs.outputs.logits is not None
    student = inputs.outputs.logits
    if teacher is None:
        raise TrainError(
            "policy loss distill_full compares whole vocabularies, and this batch has a teacher that is a server: give "
            "a local one (--opd-teacher-load), or take distill_topk or the advantage term distillation"
        )

    def compare(start: int, end: int, rows_N: Tensor) -> tuple[Tensor]:
        student_NV = student(start, end)[rows_N]
        teacher_NV = teacher(start, end).to(student_NV.device)[rows_N]
        return (divergence(student_NV, fitted(teacher_NV, student_NV.shape[-1]), options),)

    return distilled(inputs, options, compare)
