"""How far the student's next token is from the teacher's, and how to compute that without holding `[T, V]`.

    reverse   sum_v p_s (log p_s - log p_t)       goes where the teacher is, and may leave some of its ways out
    forward   sum_v p_t (log p_t - log p_s)       covers all that the teacher would do
    jsd       beta KL(p_t, m) + (1 - beta) KL(p_s, m),  m = beta p_t + (1 - beta) p_s       arXiv:2306.13649, section 2

All are 0 where the two agree. They are differentiated as they stand, by the student's logits: exact for the next token,
given the prefix that was sampled. That the prefix depends on the student too is left out, as in GKD.

`_N` rows, `_V` outcomes, `_T` tokens of a micro-batch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from miles.api import LossInputs, PolicyLoss
from miles_distillation.plugin import DistillFullOptions

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""Log-probability of what a teacher holds for impossible, -87.3: about the least whose exponential float32 can hold. It
keeps a divergence finite where a teacher masks tokens out that the student may write."""
NOTHING = -1e9
"""Logit of an outcome that is not there. Finite, since 0 times infinity is not 0."""

Compare = Callable[[int, int, Tensor], tuple[Tensor, ...]]
"""See `distilled`."""


def divergence(student_NV: Tensor, teacher_NV: Tensor, options: DistillFullOptions) -> Tensor:
    """`[N]` of rows of logits, or of anything else that is log-probabilities up to a constant a row."""
    student_NV = student_NV.float().clamp(min=NOTHING).log_softmax(-1)
    teacher_NV = teacher_NV.float().clamp(min=NOTHING).log_softmax(-1)
    weights_NV = teacher_NV.exp()
    teacher_NV = teacher_NV.clamp(min=LEAST)
    if options.divergence == "reverse":
        return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    if options.divergence == "forward":
        return (weights_NV * (teacher_NV - student_NV)).sum(-1)
    beta = options.beta
    mixed_NV = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
    of_teacher_N = (weights_NV * (teacher_NV - mixed_NV)).sum(-1)
    of_student_N = (student_NV.exp() * (student_NV - mixed_NV)).sum(-1)
    return beta * of_teacher_N + (1 - beta) * of_student_N


def fitted(teacher_NV: Tensor, vocabulary: int) -> Tensor:
    """A teacher's logits over the student's vocabulary. Checkpoints of one family pad it to different sizes: what only
    the teacher has is cut off, what only the student has is nothing to the teacher."""
    missing = vocabulary - teacher_NV.shape[-1]
    return pad(teacher_NV, (0, missing), value=NOTHING)  # a negative pad cuts


def distilled(inputs: LossInputs, options: DistillFullOptions, compare: Compare, *metrics: str) -> PolicyLoss:
    """The loss of a micro-batch, 0 on tokens that are not trained, from what `compare` says of chunks of it.

    Args:
        compare: `(start, end, rows_N) -> (loss_N, *metrics_N)` of the tokens `start + rows_N`, all before `end`. It is
            called for at most `chunk_size` tokens at once, and again in the backward pass: nothing of it is kept.
        metrics: names of what it says besides the loss.
    """
    rows_N = (inputs.mask_T[: inputs.bounds[-1]] > 0).nonzero()[:, 0]
    found = [
        checkpoint(compare, start, end, rows_N[first:last] - start, use_reentrant=False, preserve_rng_state=False)
        for start, end, first, last in _chunks(rows_N.tolist(), options.chunk_size)
    ]
    zeros_T = inputs.log_probs_T.masked_fill(torch.ones_like(inputs.mask_T, dtype=torch.bool), 0.0)
    columns = zip(*found, strict=True) if found else [()] * (1 + len(metrics))
    loss_T, *others = [zeros_T.index_copy(0, rows_N, torch.cat(parts)) if parts else zeros_T for parts in columns]
    said = dict(zip(metrics, others, strict=True)) | {f"distill_{options.divergence}": loss_T}
    return PolicyLoss(loss_T, {name: value_T.detach() for name, value_T in said.items()})


def _chunks(rows: list[int], size: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, first, last): stretches of at most `size` tokens that hold `rows[first:last]` and begin and end with
    one of them, so that prompts are looked at only where they lie between."""
    first = 0
    while first < len(rows):
        last = bisect_left(rows, rows[first] + size)
        yield rows[first], rows[last - 1] + 1, first, last
        first = last
