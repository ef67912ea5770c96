"""The loss over a few tokens: by hand, against sets of tokens in plain Python, and against the whole vocabulary."""

import math

import pytest
import torch
from miles_distillation.full import distill_full
from miles_distillation.plugin import DistillFullOptions, DistillTopkOptions
from miles_distillation.topk import distill_topk

from miles.api import ConfigError, TrainError

SUPPORTS = ["teacher", "student", "union", "intersection", "xor"]
TAILS = ["bucket", "renormalize"]
KINDS = ["reverse", "forward", "jsd"]


def run(inputs, **options):
    return distill_topk(inputs, options=DistillTopkOptions(**options))


def reported(teacher_TV, k):
    """What a server says of a teacher with these logits; row 0 is void."""
    values_TK, ids_TK = teacher_TV.log_softmax(-1).topk(k)
    values_TK[0], ids_TK[0] = 0, 0
    return {"teacher_top_k_ids": ids_TK, "teacher_top_k_log_probs": values_TK}


def over_sets(student_V, teacher_V, k, support, tail, kind):
    """The same by lists and sets of tokens, in plain Python."""
    p_s, p_t = student_V.double().softmax(-1).tolist(), teacher_V.double().softmax(-1).tolist()
    of_s, of_t = (set(sorted(range(len(p)), key=lambda v: -p[v])[:k]) for p in (p_s, p_t))
    chosen = {
        "teacher": of_t,
        "student": of_s,
        "union": of_s | of_t,
        "intersection": of_s & of_t,
        "xor": of_s ^ of_t,
    }[support]
    if tail == "bucket":
        outcomes = [(p_s[v], p_t[v]) for v in chosen]
        outcomes.append(tuple(sum(p[v] for v in range(len(p)) if v not in chosen) for p in (p_s, p_t)))
    else:
        sums = [sum(p[v] for v in chosen) for p in (p_s, p_t)]
        outcomes = [(p_s[v] / sums[0], p_t[v] / sums[1]) for v in chosen]
    total = 0.0
    for s, t in outcomes:
        m = (s + t) / 2
        reverse, forward = (s * math.log(s / t), t * math.log(t / s)) if s and t else (0.0, 0.0)
        jsd = (s * math.log(s / m) + t * math.log(t / m)) / 2 if s and t else 0.0
        total += {"reverse": reverse, "forward": forward, "jsd": jsd}[kind]
    return total


def test_by_hand(micro_batch):
    student_TV, teacher_TV = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.125, 0.625, 0.25]]).log()
    inputs = micro_batch(student_TV, teacher_TV, prompt=0)
    # the teacher's likeliest is token 1: 1/4 against 5/8, the rest 3/4 against 3/8
    bucket = 0.25 * math.log(0.4) + 0.75 * math.log(2)
    assert run(inputs, k=1).loss_T.tolist() == [pytest.approx(bucket, abs=1e-6)]
    # its two likeliest are tokens 1 and 2: (1/2, 1/2) against (5/7, 2/7)
    alone = 0.5 * math.log(0.5 / (5 / 7)) + 0.5 * math.log(0.5 / (2 / 7))
    assert run(inputs, k=2, tail="renormalize").loss_T.tolist() == [pytest.approx(alone, abs=1e-6)]
    masses = run(inputs, k=2).metrics_T
    assert masses["distill_student_mass"].tolist() == [pytest.approx(0.5)]
    assert masses["distill_teacher_mass"].tolist() == [pytest.approx(0.875)]


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_sets_of_tokens(micro_batch, random_logits, support, tail, kind):
    student_TV, teacher_TV = random_logits(0, 40, 9), random_logits(1, 40, 9)
    for k in (1, 3, 6):
        found_T = run(
            micro_batch(student_TV, teacher_TV, prompt=0), k=k, support=support, tail=tail, divergence=kind
        ).loss_T
        pairs = zip(student_TV, teacher_TV, strict=True)
        expected = [over_sets(s_V, t_V, k, support, tail, kind) for s_V, t_V in pairs]
        torch.testing.assert_close(found_T, torch.tensor(expected, dtype=torch.float32), atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("support", ["teacher", "student", "union", "intersection"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [17, 1000])
def test_all_tokens_are_the_whole_vocabulary(micro_batch, random_logits, support, tail, kind, k):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV, [6, 7])
    found_T = run(inputs, k=k, support=support, tail=tail, divergence=kind).loss_T
    expected_T = distill_full(inputs, options=DistillFullOptions(divergence=kind)).loss_T
    torch.testing.assert_close(found_T, expected_T, atol=2e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(loss_T.sum(), student_TV)[0] for loss_T in (found_T, expected_T)]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_never_says_more_than_the_whole_vocabulary(micro_batch, random_logits, support, kind):
    student_TV, teacher_TV = random_logits(0), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV)
    last_T = torch.zeros(13)
    for k in (1, 2, 4, 8, 16):
        found_T = run(inputs, k=k, support=support, divergence=kind).loss_T.detach()
        assert (found_T >= last_T - 1e-6).all(), f"k={k} sees less than fewer tokens did"
        last_T = found_T
    assert (distill_full(inputs, options=DistillFullOptions(divergence=kind)).loss_T >= last_T - 1e-6).all()


@pytest.mark.parametrize("tail", TAILS)
def test_the_gradient_is_that_of_the_outcomes_alone(micro_batch, random_logits, tail):
    """Against autograd on dense probabilities, the choice of tokens held fixed."""
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    inputs = micro_batch(student_TV, teacher_TV, prompt=0)
    (found_TV,) = torch.autograd.grad(run(inputs, k=4, tail=tail, chunk_size=3).loss_T.sum(), student_TV)
    ids_TK = teacher_TV.topk(4).indices
    p_s, p_t = (logits.softmax(-1) for logits in (student_TV, teacher_TV))
    p_s, p_t = (p.gather(-1, ids_TK) for p in (p_s, p_t))
    if tail == "bucket":
        p_s, p_t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (p_s, p_t))
    else:
        p_s, p_t = (p / p.sum(-1, keepdim=True) for p in (p_s, p_t))
    (expected_TV,) = torch.autograd.grad((p_s * (p_s / p_t).log()).sum(), student_TV)
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 17])
def test_a_server_says_as_much_as_a_local_teacher(micro_batch, random_logits, tail, kind, k):
    student_TV, teacher_TV = random_logits(0).requires_grad_(), random_logits(1)
    local = micro_batch(student_TV, teacher_TV, [6, 7])
    server = micro_batch(student_TV, None, [6, 7], columns=reported(teacher_TV, k))
    options = {"k": k, "tail": tail, "divergence": kind, "chunk_size": 4}
    losses = [run(inputs, **options).loss_T for inputs in (server, local)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(loss_T.sum(), student_TV)[0] for loss_T in losses]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", TAILS)
def test_extreme_logits_are_finite(micro_batch, support, tail):
    wild = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 1e4, 1e4], [-1e4, 1e4, -1e4]])
    masked = torch.tensor([[-torch.inf, 0.0, 1.0], [0.0, -torch.inf, -torch.inf], [1e4, -torch.inf, -1e4], [0, 0, 0]])
    for teacher_TV in (wild, wild.flip(-1), masked):
        for kind in KINDS:
            student_TV = wild.clone().requires_grad_()
            inputs = micro_batch(student_TV, teacher_TV, prompt=0)
            loss_T = run(inputs, k=2, support=support, tail=tail, divergence=kind).loss_T
            assert loss_T.isfinite().all(), (kind, teacher_TV)
            (gradient,) = torch.autograd.grad(loss_T.sum(), student_TV)
            assert gradient.isfinite().all(), (kind, teacher_TV)


@pytest.mark.parametrize("support", ["intersection", "xor"])
def test_no_token_to_look_at_is_no_loss(micro_batch, support):
    # the likeliest tokens differ (no intersection), or agree (no xor)
    student_TV = torch.tensor([[3.0, 0.0, 1.0]], requires_grad=True)
    teacher_TV = torch.tensor([[0.0, 3.0, 1.0]] if support == "intersection" else [[3.0, 1.0, 0.0]])
    for tail in TAILS:
        loss_T = run(micro_batch(student_TV, teacher_TV, prompt=0), k=1, support=support, tail=tail).loss_T
        assert loss_T.tolist() == [0.0]
        (gradient,) = torch.autograd.grad(loss_T.sum(), student_TV)
        assert (gradient == 0).all()


def test_upstreams_words_for_the_support_are_understood(micro_batch, random_logits):
    inputs = micro_batch(random_logits(0), random_logits(1))
    for word in ("teacher", "student"):
        assert torch.equal(run(inputs, k=3, support=f"only-{word}").loss_T, run(inputs, k=3, support=word).loss_T)


@pytest.mark.parametrize("chunk_size", [1, 4, 256])
def test_chunks_masks_and_void_rows(micro_batch, random_logits, chunk_size):
    student_TV, teacher_TV = random_logits(0), random_logits(1)
    expected_T = run(micro_batch(student_TV, teacher_TV, [6, 7]), k=3).loss_T
    inputs = micro_batch(student_TV, teacher_TV, [6, 7])
    void = inputs.mask_T == 0
    student_TV[void], teacher_TV[void] = torch.nan, torch.nan
    found = run(inputs, k=3, chunk_size=chunk_size)
    torch.testing.assert_close(found.loss_T, expected_T, atol=1e-6, rtol=1e-6)
    assert (found.loss_T[void] == 0).all()
    assert all((metric_T[void] == 0).all() and not metric_T.requires_grad for metric_T in found.metrics_T.values())


def test_what_a_server_cannot_say_is_refused(micro_batch, random_logits):
    student_TV = random_logits(0)
    told = micro_batch(student_TV, columns=reported(random_logits(1), 3))
    for support in ("student", "union", "only-student", "xor"):
        with pytest.raises(TrainError, match="--opd-teacher-load"):
            run(told, k=3, support=support)
    with pytest.raises(TrainError, match="needs a teacher"):
        run(micro_batch(student_TV), k=3)
    foreign = micro_batch(student_TV, columns=reported(random_logits(1, vocabulary=30), 25))
    with pytest.raises(TrainError, match="share a tokenizer"):
        run(foreign, k=25)


@pytest.mark.parametrize("bad", [{"k": 0}, {"beta": 2.0}, {"chunk_size": 0}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DistillTopkOptions(**bad)
