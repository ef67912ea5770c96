"""Distillation over the likeliest tokens: the divergence of student and teacher over a few outcomes of each draw.

The outcomes of a token are the `k` likeliest tokens of the teacher, of the student, of either (union), of both
(intersection) or of exactly one of them (xor), and then

    bucket        one more outcome that holds the rest of the vocabulary. Never more than the divergence over the whole
                  vocabulary, and equal to it where `k` covers that.
    renormalize   the rest is left out and both models are rescaled: a student may write what is not among the outcomes
                  without being told.

Which tokens are looked at is no part of the gradient. A teacher that is a server says its own likeliest tokens only.

`_N` rows, `_V` vocabulary, `_M` tokens looked at, `_O` outcomes, `_T` tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miles.api import LossInputs, PolicyLoss, TrainError
from miles_distillation.divergences import NOTHING, distilled, divergence, fitted
from miles_distillation.plugin import DistillTopkOptions

MOST = 1 - 2**-23
"""Of a sum of reported probabilities: nearer to 1, float32 cannot tell what they leave to the rest."""


def distill_topk(inputs: LossInputs, *, options: DistillTopkOptions) -> PolicyLoss:
    """Divergence over the support, `[T]`, 0 where the mask is. Metrics say how much of each model the support holds.

    Raises:
        TrainError: the teacher is a server, and the support asks for more than it says, or it names tokens that the
            student lacks.
    """
    assert inputs.outputs is not None
    assert inputs.outputs.logits is not None
    student = inputs.outputs.logits
    of_teacher = _local(inputs, options) or _reported(inputs, options)

    def compare(start: int, end: int, rows_N: Tensor) -> tuple[Tensor, ...]:
        student_NV = student(start, end)[rows_N].float()
        ids_NM, valid_NM, teacher_NM, teacher_rest_N = of_teacher(start, end, rows_N, student_NV)
        inside_NV = _inside(ids_NM, valid_NM, student_NV)
        rest_N = student_NV.masked_fill(inside_NV, NOTHING).logsumexp(-1)
        teacher_rest_N = teacher_rest_N.masked_fill(inside_NV.all(-1), NOTHING)
        outcomes = (student_NV.gather(-1, ids_NM), rest_N), (teacher_NM, teacher_rest_N)
        whole = [torch.cat([x_NM.masked_fill(~valid_NM, NOTHING), r_N[:, None]], -1) for x_NM, r_N in outcomes]
        masses = [1 - x_NO.detach().softmax(-1)[:, -1] for x_NO in whole]
        if options.tail == "renormalize":
            whole = [x_NO[:, :-1] for x_NO in whole]
        student_NO, teacher_NO = whole
        return divergence(student_NO, teacher_NO, options), *masses

    return distilled(inputs, options, compare, "distill_student_mass", "distill_teacher_mass")


Opinion = tuple[Tensor, Tensor, Tensor, Tensor]
"""`[N, M]` ids, which of them count, the teacher's logits of them, and `[N]` its logit of all other tokens together."""


def _local(inputs: LossInputs, options: DistillTopkOptions) -> Callable[[int, int, Tensor, Tensor], Opinion] | None:
    """The opinion of a teacher whose logits are here."""
    logits = inputs.teacher_logits
    if logits is None:
        return None

    def opinion(start: int, end: int, rows_N: Tensor, student_NV: Tensor) -> Opinion:
        teacher_NV = fitted(logits(start, end).to(student_NV.device)[rows_N].float(), student_NV.shape[-1])
        teacher_NV = teacher_NV.clamp(min=NOTHING)
        ids_NM, valid_NM = _support(student_NV.detach(), teacher_NV, options)
        rest_N = teacher_NV.masked_fill(_inside(ids_NM, valid_NM, teacher_NV), NOTHING).logsumexp(-1)
        return ids_NM, valid_NM, teacher_NV.gather(-1, ids_NM), rest_N

    return opinion


def _reported(inputs: LossInputs, options: DistillTopkOptions) -> Callable[[int, int, Tensor, Tensor], Opinion]:
    """The opinion of a teacher that reported its likeliest tokens with their log-probs."""
    if "teacher_top_k_ids" not in inputs.columns:
        raise TrainError("policy loss distill_topk needs a teacher: --opd-teacher-load or --opd-teacher-urls")
    if options.support.removeprefix("only-") != "teacher":
        raise TrainError(
            f"policy loss distill_topk: support {options.support!r} needs the teacher's opinion of tokens that it does "
            "not name, and this batch has a teacher that is a server: support: teacher, or --opd-teacher-load"
        )
    ids_TK, log_probs_TK = inputs.columns["teacher_top_k_ids"], inputs.columns["teacher_top_k_log_probs"]

    def opinion(start: int, end: int, rows_N: Tensor, student_NV: Tensor) -> Opinion:
        ids_NM, log_probs_NM = ids_TK[start:end][rows_N], log_probs_TK[start:end][rows_N].float()
        worst = int(ids_NM.max()) if ids_NM.numel() else 0
        if worst >= student_NV.shape[-1]:
            raise TrainError(
                f"policy loss distill_topk: the teacher names token {worst}, and the student's vocabulary has "
                f"{student_NV.shape[-1]}: teacher and student must share a tokenizer"
            )
        rest_N = torch.log1p(-log_probs_NM.exp().sum(-1).clamp(max=MOST))
        return ids_NM, torch.ones_like(ids_NM, dtype=torch.bool), log_probs_NM, rest_N

    return opinion


def _support(student_NV: Tensor, teacher_NV: Tensor, options: DistillTopkOptions) -> tuple[Tensor, Tensor]:
    """`[N, M]`: the tokens that are looked at, and which of these places count (a token stands in one of them)."""
    k, support = min(options.k, student_NV.shape[-1]), options.support.removeprefix("only-")
    of_student_NK, of_teacher_NK = student_NV.topk(k).indices, teacher_NV.topk(k).indices
    if support in ("teacher", "student"):
        ids_NK = of_teacher_NK if support == "teacher" else of_student_NK
        return ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
    every_NK = torch.ones_like(of_teacher_NK, dtype=torch.bool)
    shared_NK = _inside(of_student_NK, every_NK, student_NV).gather(-1, of_teacher_NK)
    if support == "intersection":
        return of_teacher_NK, shared_NK
    only_student_NK = ~_inside(of_teacher_NK, every_NK, student_NV).gather(-1, of_student_NK)
    of_teacher_too_NK = every_NK if support == "union" else ~shared_NK
    return torch.cat([of_teacher_NK, of_student_NK], -1), torch.cat([of_teacher_too_NK, only_student_NK], -1)


def _inside(ids_NM: Tensor, valid_NM: Tensor, like_NV: Tensor) -> Tensor:
    """`[N, V]`: which tokens are among those that count."""
    counts_NV = torch.zeros(like_NV.shape, dtype=torch.int32, device=like_NV.device)
    return counts_NV.scatter_add(-1, ids_NM, valid_NM.int()) > 0
