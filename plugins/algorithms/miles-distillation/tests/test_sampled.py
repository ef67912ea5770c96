"""The sampled-token term: hand-worked numbers, and that its mean over draws is the gradient of the reverse KL."""

import pytest
import torch
from miles_distillation.divergences import LEAST
from miles_distillation.plugin import DistillationOptions
from miles_distillation.sampled import distillation

from miles.api import AdvantageInputs, ConfigError


def inputs_of(student, teacher, mask=None, rewards=(0.0,)):
    count = len(student)
    return AdvantageInputs(
        rewards_N=torch.tensor(rewards, dtype=torch.float64),
        mask_T=torch.ones(count) if mask is None else torch.tensor(mask),
        bounds=[0, count],
        group_N=torch.zeros(1, dtype=torch.int64),
        rollout_N=torch.zeros(1, dtype=torch.int64),
        old_log_probs_T=torch.tensor(student),
        teacher_log_probs_T=torch.tensor(teacher),
    )


def test_by_hand():
    found = distillation(inputs_of([-1.0, -2.0, -0.5], [-0.5, -3.0, -0.5]), options=DistillationOptions())
    assert found.advantages_T.tolist() == [0.5, -1.0, 0.0]
    assert found.metrics == {"train/distill_sampled_kl": pytest.approx(0.5 / 3)}


def test_the_coefficient_scales_and_the_mask_holds():
    inputs = inputs_of([-1.0, -2.0, float("nan")], [-0.5, -3.0, float("nan")], mask=[1.0, 1.0, 0.0])
    found = distillation(inputs, options=DistillationOptions(coef=0.25))
    assert found.advantages_T.tolist() == [0.125, -0.25, 0.0]
    assert found.metrics["train/distill_sampled_kl"] == pytest.approx(0.25)  # unscaled: nats


def test_what_the_teacher_holds_for_impossible_is_very_bad_and_not_infinite():
    found = distillation(inputs_of([-1.0], [-torch.inf]), options=DistillationOptions())
    assert found.advantages_T.tolist() == [pytest.approx(LEAST + 1)]


def test_rewards_play_no_part():
    one, other = (inputs_of([-1.0], [-2.0], rewards=(r,)) for r in (0.0, 5.0))
    options = DistillationOptions()
    assert torch.equal(
        distillation(one, options=options).advantages_T, distillation(other, options=options).advantages_T
    )


def test_over_all_draws_it_is_the_gradient_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    student_V, teacher_V = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    student_V.requires_grad_()
    log_probs_V, teacher_V = student_V.log_softmax(-1), teacher_V.log_softmax(-1)
    kl = (log_probs_V.exp() * (log_probs_V - teacher_V)).sum()
    (expected_V,) = torch.autograd.grad(kl, student_V, retain_graph=True)
    # REINFORCE of every token that could be drawn, weighted with how often it is
    inputs = inputs_of(log_probs_V.detach().tolist(), teacher_V.tolist())
    advantages_V = distillation(inputs, options=DistillationOptions()).advantages_T
    loss = -(log_probs_V.detach().exp() * advantages_V * log_probs_V).sum()
    (found_V,) = torch.autograd.grad(loss, student_V)
    torch.testing.assert_close(found_V, expected_V, atol=1e-6, rtol=0)


def test_without_a_trained_token():
    found = distillation(inputs_of([-1.0], [-2.0], mask=[0.0]), options=DistillationOptions())
    assert found.advantages_T.tolist() == [0.0]
    assert found.metrics == {"train/distill_sampled_kl": 0.0}


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ConfigError, match="coef=-1"):
        DistillationOptions(coef=-1.0)
