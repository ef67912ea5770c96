"""CISPO against hand-worked numbers and the values of other frameworks."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_cispo.cispo import cispo
from miles_cispo.plugin import CispoOptions

from miles.api import ConfigError, LossInputs
from miles.testing import golden_batch, measured


def inputs_of(log_ratios, advantages, new=-2.0):
    new_T = torch.full((len(log_ratios),), new, requires_grad=True)
    old_T = new - torch.tensor(log_ratios)
    return LossInputs(new_T, old_T, torch.tensor(advantages), torch.ones(len(log_ratios)), [0, len(log_ratios)])


def test_by_hand():
    inputs = inputs_of([0.0, math.log(2), math.log(8), math.log(0.1)], [1.0, -1.0, 2.0, 1.0])
    result = cispo(inputs, options=CispoOptions())
    # weights 1, 2, 5 (clipped at 1 + 4), 0.1 (no lower bound); -w A lp with lp = -2
    assert result.loss_T.tolist() == pytest.approx([2.0, -4.0, 20.0, 0.2])
    assert result.metrics_T["pg_clipfrac"].tolist() == [0, 0, 1, 0]
    assert result.metrics_T["ratio"].tolist() == pytest.approx([1, 2, 8, 0.1])
    result.loss_T.sum().backward()
    # nothing is taken out of the gradient: -w A, where PPO's would be 0 for the third
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([-1.0, 2.0, -10.0, -0.1])


def test_with_a_lower_bound():
    inputs = inputs_of([math.log(0.1), math.log(2), 0.1], [1.0, 1.0, 1.0])
    result = cispo(inputs, options=CispoOptions(eps=0.2, eps_high=0.28))
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([-0.8, -1.28, -math.exp(0.1)])
    assert result.metrics_T["pg_clipfrac_low"].tolist() == [1, 0, 0]
    assert result.metrics_T["pg_clipfrac_high"].tolist() == [0, 1, 0]


def test_agrees_with_verl_skyrl_and_slime():
    loss = partial(cispo, options=CispoOptions(eps=0.2, eps_high=0.28))
    expected = (0.0793985, 0.0600286, -0.0060606)
    assert measured(loss, golden_batch(), "token_mean") == pytest.approx(expected, abs=1e-7)


def test_agrees_with_trl_whose_upper_bound_is_absolute_and_the_only_one():
    loss = partial(cispo, options=CispoOptions(eps=None, eps_high=0.28))  # TRL: epsilon_high=1.28
    found, norm, _ = measured(loss, golden_batch(), "token_mean")
    assert (found, norm) == pytest.approx((0.0816592, 0.0592327), abs=1e-7)


def test_from_one_on_eps_bounds_nothing():
    inputs = inputs_of([-50.0, -1.0, 0.5], [1.0, -1.0, 1.0])
    free, wide = (cispo(inputs, options=CispoOptions(eps=eps)) for eps in (None, 1.0))
    assert torch.equal(free.loss_T, wide.loss_T)


@given(st.floats(-1000, 1000, width=32), st.floats(-5, 5, width=32))
def test_the_weight_is_bounded_and_the_sign_is_that_of_the_advantage(log_ratio, advantage):
    inputs = inputs_of([log_ratio], [advantage])
    cispo(inputs, options=CispoOptions()).loss_T.sum().backward()
    gradient = inputs.log_probs_T.grad.item()
    assert math.isfinite(gradient)
    assert gradient * advantage <= 0
    assert abs(gradient) <= 5 * abs(advantage) * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"eps": -0.1}, {"eps_high": -1.0}])
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CispoOptions(**options)
