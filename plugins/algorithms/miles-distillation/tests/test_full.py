"""The loss over the whole vocabulary: chunks, masks and pads change memory and nothing else; its gradient is exact."""

from dataclasses import replace

import pytest
import torch
from miles_distillation.full import distill_full
from miles_distillation.plugin import DistillFullOptions
from torch.distributions import Categorical, kl_divergence

from miles.api import TrainError

LENGTHS = [4, 6, 3]
KINDS = ["reverse", "forward", "jsd"]


def gradient(inputs, student_TV, **options):
    """Loss and `d sum(mask * loss) / d logits`."""
    result = distill_full(inputs, options=DistillFullOptions(**options))
    (found_TV,) = torch.autograd.grad((result.loss_T * inputs.mask_T).sum(), student_TV)
    return result.loss_T.detach(), found_TV


def dense(student_TV, teacher_TV, kind):
    p_s, p_t = Categorical(logits=student_TV), Categorical(logits=teacher_TV)
    mixture = Categorical(probs=(p_s.probs + p_t.probs) / 2)
    return {
        "reverse": lambda: kl_divergence(p_s, p_t),
        "forward": lambda: kl_divergence(p_t, p_s),
        "jsd": lambda: (kl_divergence(p_s, mixture) + kl_divergence(p_t, mixture)) / 2,
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 256])
def test_chunks_give_the_dense_loss_and_its_gradient(micro_batch, random_logits, kind, chunk_size):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV, LENGTHS)
    loss_T, found_TV = gradient(inputs, student_TV, divergence=kind, chunk_size=chunk_size)
    expected_T = dense(student_TV, teacher_TV, kind) * inputs.mask_T
    (expected_TV,) = torch.autograd.grad(expected_T.sum(), student_TV)
    torch.testing.assert_close(loss_T, expected_T.detach(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found_TV, expected_TV, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_no_more_rows_than_a_chunk_are_asked_for_at_once(micro_batch, random_logits, chunk_size):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV, LENGTHS)
    gradient(inputs, student_TV, chunk_size=chunk_size)
    for logits in (inputs.outputs.logits, inputs.teacher_logits):
        assert max(end - start for start, end in logits.asked) <= chunk_size
        assert all(inputs.mask_T[start] and inputs.mask_T[end - 1] for start, end in logits.asked)
        forward = logits.asked[: len(logits.asked) // 2]  # the other half is the backward pass
        assert sorted(forward) == sorted(logits.asked[len(forward) :])


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass(micro_batch, random_logits):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        distill_full(micro_batch(student_TV, teacher_TV, LENGTHS), options=DistillFullOptions(chunk_size=4))
    assert [shape for shape in kept if shape and shape[-1] == student_TV.shape[1]] == []


def test_void_rows_may_hold_anything(micro_batch, random_logits):
    student_TV, teacher_TV = random_logits(0), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV, LENGTHS)
    expected_T = distill_full(inputs, options=DistillFullOptions()).loss_T.detach()
    void = inputs.mask_T == 0
    student_TV[void], teacher_TV[void] = torch.nan, torch.nan
    student_TV.requires_grad_()
    loss_T, found_TV = gradient(micro_batch(student_TV, teacher_TV, LENGTHS), student_TV, chunk_size=5)
    assert torch.equal(loss_T, expected_T)
    assert (found_TV[void] == 0).all()
    assert found_TV.isfinite().all()


def test_a_pad_is_no_sample(micro_batch, random_logits):
    student_TV, teacher_TV = random_logits(0), random_logits(1)
    padded = micro_batch(student_TV, teacher_TV, [4, 6])  # three rows of pad
    padded.mask_T[-3:] = 1
    loss_T = distill_full(padded, options=DistillFullOptions()).loss_T
    assert loss_T.shape == (13,)
    assert (loss_T[-3:] == 0).all()


def test_samples_packed_together_and_alone(micro_batch, random_logits):
    student_TV, teacher_TV = random_logits(0), random_logits(1)
    together = distill_full(micro_batch(student_TV, teacher_TV, LENGTHS), options=DistillFullOptions()).loss_T
    pairs = zip(student_TV.split(LENGTHS), teacher_TV.split(LENGTHS), strict=True)
    alone = [
        distill_full(micro_batch(s_TV, t_TV), options=DistillFullOptions(chunk_size=2)).loss_T for s_TV, t_TV in pairs
    ]
    torch.testing.assert_close(together.detach(), torch.cat(alone).detach())


@pytest.mark.parametrize("lengths", [[2, 2], []])
def test_without_a_trained_token_there_is_a_loss_of_zero_to_differentiate(micro_batch, random_logits, lengths):
    tokens = sum(lengths)
    inputs = micro_batch(random_logits(0, tokens), random_logits(1, tokens), lengths)
    result = distill_full(inputs, options=DistillFullOptions())
    result.loss_T.sum().backward()
    assert result.loss_T.tolist() == [0.0] * tokens
    assert inputs.log_probs_T.grad.tolist() == [0.0] * tokens
    assert result.metrics_T["distill_reverse"].tolist() == [0.0] * tokens
    assert inputs.outputs.logits.asked == []


def test_its_metric_is_the_divergence_and_detached(micro_batch, random_logits):
    student_TV = random_logits(0).requires_grad_()
    result = distill_full(micro_batch(student_TV, random_logits(1)), options=DistillFullOptions(divergence="jsd"))
    assert list(result.metrics_T) == ["distill_jsd"]
    assert torch.equal(result.metrics_T["distill_jsd"], result.loss_T)
    assert not result.metrics_T["distill_jsd"].requires_grad


@pytest.mark.parametrize("extra", [-3, 3])
def test_a_teacher_whose_vocabulary_is_padded_otherwise(micro_batch, random_logits, extra):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1, vocabulary=17 + extra)
    loss_T, found_TV = gradient(micro_batch(student_TV, teacher_TV), student_TV)
    assert loss_T.isfinite().all()
    assert found_TV.isfinite().all()
    if extra > 0:
        expected_T = dense(student_TV, teacher_TV[:, :17], "reverse").detach()
        torch.testing.assert_close(loss_T[2:], expected_T[2:], atol=2e-6, rtol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn(micro_batch, random_logits):
    student_TV = random_logits(0).requires_grad_()
    loss_T, found_TV = gradient(micro_batch(student_TV, student_TV.detach() + 4), student_TV)
    assert loss_T.abs().max() < 1e-5
    assert found_TV.abs().max() < 1e-5


def test_without_a_local_teacher_the_error_says_what_to_do(micro_batch, random_logits):
    inputs = replace(micro_batch(random_logits(0)), teacher_logits=None)
    with pytest.raises(TrainError, match="--opd-teacher-load"):
        distill_full(inputs, options=DistillFullOptions())
