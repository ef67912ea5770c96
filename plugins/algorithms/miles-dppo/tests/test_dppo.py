"""DPPO against hand-worked numbers and verl's values."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_dppo.dppo import dppo_tv
from miles_dppo.plugin import DppoOptions

from miles.api import ConfigError, LossInputs
from miles.testing import golden_batch, measured


def inputs_of(new, old, advantages):
    """Tokens given by their probabilities under the two policies."""
    new_T = torch.tensor(new).log().requires_grad_()
    count = len(new)
    return LossInputs(new_T, torch.tensor(old).log(), torch.tensor(advantages), torch.ones(count), [0, count])


def test_by_hand():
    new, old = [0.002, 0.80, 0.70, 0.30, 0.70, 0.30], [0.001, 0.99, 0.50, 0.50, 0.50, 0.50]
    advantages = [1.0, -1.0, 1.0, -1.0, -1.0, 1.0]
    inputs = inputs_of(new, old, advantages)
    result = dppo_tv(inputs, options=DppoOptions(delta=0.15))
    # a doubled rare token goes on; 0.19 down, 0.2 up and 0.2 down are masked; what leads back never is
    assert result.metrics_T["pg_clipfrac"].tolist() == [0, 1, 1, 1, 0, 0]
    assert result.metrics_T["pg_clipfrac_low"].tolist() == [0, 1, 0, 1, 0, 0]
    assert result.metrics_T["pg_clipfrac_high"].tolist() == [0, 0, 1, 0, 0, 0]
    assert result.metrics_T["tv"].tolist() == pytest.approx([0.001, 0.19, 0.2, 0.2, 0.2, 0.2], abs=1e-6)
    expected = [-2 * math.log(0.002), 0, 0, 0, 1.4 * math.log(0.7), -0.6 * math.log(0.3)]
    assert result.loss_T.tolist() == pytest.approx(expected, rel=1e-5)
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([-2, 0, 0, 0, 1.4, -0.6], rel=1e-5)


def test_bounds_of_their_own():
    result = dppo_tv(inputs_of([0.7, 0.3], [0.5, 0.5], [1.0, -1.0]), options=DppoOptions(delta=0.15, delta_high=0.25))
    assert result.metrics_T["pg_clipfrac"].tolist() == [0, 1]


def test_a_large_ratio_is_truncated():
    inputs = inputs_of([0.1, 0.1, 0.1], [0.001, 0.02, 0.001], [-1.0, -1.0, 1.0])
    result = dppo_tv(inputs, options=DppoOptions(truncation=20))
    assert result.metrics_T["truncated"].tolist() == [1, 0, 1]
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([20, 5, -20], rel=1e-5)
    free = inputs_of([0.1], [0.001], [-1.0])
    dppo_tv(free, options=DppoOptions(truncation=None)).loss_T.sum().backward()
    assert free.log_probs_T.grad.item() == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize(
    ("shift", "low", "high", "truncation", "expected"),
    [
        (0.0, 0.2, 0.28, 3.0, (0.0889723, 0.0614326, -0.0050203)),
        (0.0, 0.05, 0.1, 3.0, (0.0970654, 0.0552460, -0.0050203)),
        (0.0, 0.15, 0.15, 20.0, (0.0787871, 0.0591854, -0.0050203)),
        (1.5, 0.15, 0.15, 3.0, (-0.4992494, 0.1365222, -0.0224994)),  # ratios of 4.5: 36% of the tokens are truncated
    ],
)
def test_agrees_with_verl(shift, low, high, truncation, expected):
    """compute_policy_loss_dppo_tv of verl 0.9.1, whose clip_ratio_low, _high and _c are the three options."""
    inputs = golden_batch()
    inputs = replace(inputs, old_log_probs_T=inputs.old_log_probs_T - shift)
    loss = partial(dppo_tv, options=DppoOptions(delta=low, delta_high=high, truncation=truncation))
    assert measured(loss, inputs, "token_mean") == pytest.approx(expected, abs=1e-6)


@given(st.floats(-100, 0, width=32), st.floats(-100, 0, width=32), st.floats(-5, 5, width=32))
def test_far_apart_it_is_finite_and_pulls_the_way_of_the_advantage(new, old, advantage):
    one = torch.ones(1)
    inputs = LossInputs(torch.tensor([new], requires_grad=True), torch.tensor([old]), one * advantage, one, [0, 1])
    result = dppo_tv(inputs, options=DppoOptions())
    result.loss_T.sum().backward()
    gradient = inputs.log_probs_T.grad.item()
    assert math.isfinite(result.loss_T.item())
    assert gradient * advantage <= 0
    assert abs(gradient) <= 20 * abs(advantage) * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"delta": 1.5}, {"delta_high": -0.1}, {"truncation": 0.0}])
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DppoOptions(**options)
