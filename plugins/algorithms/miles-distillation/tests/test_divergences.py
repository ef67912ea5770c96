"""Divergences of rows of logits: by hand, against torch.distributions, their gradients in closed form, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_distillation.divergences import LEAST, NOTHING, divergence, fitted
from miles_distillation.plugin import DistillFullOptions
from torch.distributions import Categorical, kl_divergence

from miles.api import ConfigError

ALL = [
    DistillFullOptions(divergence="reverse"),
    DistillFullOptions(divergence="forward"),
    DistillFullOptions(divergence="jsd"),
    DistillFullOptions(divergence="jsd", beta=0.1),
]
every_divergence = pytest.mark.parametrize("options", ALL, ids=lambda o: f"{o.divergence}-{o.beta}")


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("reverse", 0.5, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("forward", 0.5, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        # the mixture is (3/8, 5/8)
        ("jsd", 0.5, 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3 * 4 / 5))),
        # the mixture is 0.2 (1/4, 3/4) + 0.8 (1/2, 1/2) = (0.45, 0.55)
        (
            "jsd",
            0.2,
            0.2 * (0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55))
            + 0.8 * (0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55)),
        ),
    ],
)
def test_by_hand(kind, beta, expected):
    student, teacher = torch.tensor([[0.5, 0.5]]).log() + 3, torch.tensor([[0.25, 0.75]]).log() - 1
    found = divergence(student, teacher, DistillFullOptions(divergence=kind, beta=beta))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-7, rtol=0)


def test_against_torch_distributions():
    student, teacher = rows(0, 5, 11), rows(1, 5, 11)
    p_s, p_t = Categorical(logits=student), Categorical(logits=teacher)
    mixture = Categorical(probs=0.3 * p_t.probs + 0.7 * p_s.probs)
    expected = {
        "reverse": kl_divergence(p_s, p_t),
        "forward": kl_divergence(p_t, p_s),
        "jsd": 0.3 * kl_divergence(p_t, mixture) + 0.7 * kl_divergence(p_s, mixture),
    }
    for kind, expected_N in expected.items():
        found_N = divergence(student, teacher, DistillFullOptions(divergence=kind, beta=0.3))
        torch.testing.assert_close(found_N, expected_N, atol=2e-6, rtol=1e-5, msg=kind)


def test_gradients_in_closed_form():
    student, teacher = rows(2, 4, 9).requires_grad_(), rows(3, 4, 9)
    p_s, p_t = student.detach().softmax(-1), teacher.softmax(-1)
    ratio = p_s.log() - p_t.log()
    expected = {"reverse": p_s * (ratio - (p_s * ratio).sum(-1, keepdim=True)), "forward": p_s - p_t}
    for kind, expected_NV in expected.items():
        found = divergence(student, teacher, DistillFullOptions(divergence=kind)).sum()
        (found_NV,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(found_NV, expected_NV, atol=1e-6, rtol=1e-4, msg=kind)


def test_the_ends_of_jensen_shannon():
    student, teacher = rows(4, 3, 7).double(), rows(5, 3, 7).double()
    for beta, kind, weight in ((1e-3, "forward", 1e-3), (1 - 1e-3, "reverse", 1e-3)):
        jsd = divergence(student, teacher, DistillFullOptions(divergence="jsd", beta=beta)) / weight
        torch.testing.assert_close(
            jsd, divergence(student, teacher, DistillFullOptions(divergence=kind)), rtol=0.1, atol=0
        )


@every_divergence
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 30), shift=st.floats(-50, 50))
def test_never_negative_zero_where_they_agree_and_blind_to_a_constant(options, seed, scale, shift):
    student, teacher = rows(seed, 2, 6) * scale, rows(seed + 1, 2, 6) * scale
    found_N = divergence(student, teacher, options)
    assert (found_N > -1e-5).all()
    assert divergence(student, student + shift, options).abs().max() < 1e-4
    torch.testing.assert_close(divergence(student + shift, teacher - shift, options), found_N, atol=1e-3, rtol=1e-3)


@every_divergence
def test_extreme_logits_are_finite(options):
    wild = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 1e4, 1e4], [-1e4, 1e4, -1e4]])
    masked = torch.tensor([[-torch.inf, 0.0, 1.0], [0.0, -torch.inf, -torch.inf], [1e4, -torch.inf, -1e4]])
    for teacher in (wild, wild.flip(-1), wild.roll(1, 0), masked[[0, 1, 2, 2]]):
        for student in (wild, masked[[1, 2, 0, 1]]):
            student = student.clone().requires_grad_()
            found_N = divergence(student, teacher, options)
            assert found_N.isfinite().all()
            (gradient,) = torch.autograd.grad(found_N.sum(), student)
            assert gradient.isfinite().all()


def test_a_token_that_the_teacher_forbids_costs_what_its_least_is_worth():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, -torch.inf]])
    found = divergence(student, teacher, DistillFullOptions())
    torch.testing.assert_close(found, torch.tensor([-math.log(2) - 0.5 * LEAST]))


def test_a_collapsed_student_is_still_pulled_by_the_forward_divergence():
    student, teacher = torch.tensor([[0.0, -300.0]], requires_grad=True), torch.tensor([[0.5, 0.5]]).log()
    divergence(student, teacher, DistillFullOptions(divergence="forward")).sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5]]))


def test_vocabularies_that_are_padded_otherwise():
    teacher = torch.tensor([[1.0, 2.0, 3.0]])
    assert fitted(teacher, 2).tolist() == [[1.0, 2.0]]
    assert fitted(teacher, 3).tolist() == teacher.tolist()
    assert fitted(teacher, 4).tolist() == [[1.0, 2.0, 3.0, NOTHING]]


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": 1.0}, {"beta": -0.5}, {"chunk_size": 0}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DistillFullOptions(**bad)
