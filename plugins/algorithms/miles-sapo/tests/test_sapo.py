"""SAPO against hand-worked numbers and the values of other frameworks."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_sapo.plugin import SapoOptions
from miles_sapo.sapo import sapo

from miles.api import ConfigError, LossInputs
from miles.testing import golden_batch, measured


def inputs_of(log_ratios, advantages):
    new_T = torch.zeros(len(log_ratios), requires_grad=True)
    old_T = -torch.tensor(log_ratios)
    return LossInputs(new_T, old_T, torch.tensor(advantages), torch.ones(len(log_ratios)), [0, len(log_ratios)])


def test_by_hand():
    inputs = inputs_of([0.0, math.log(2), math.log(2), math.log(0.5)], [1.0, 1.0, -1.0, 3.0])
    result = sapo(inputs, options=SapoOptions(tau_pos=1.0, tau_neg=2.0))
    e = math.e
    up, down, back = e / (1 + e), e**2 / (1 + e**2), 1 / (1 + e**0.5)  # sigmoids of 1, of 2, of -1/2
    assert result.loss_T.tolist() == pytest.approx([-2.0, -4 * up, 2 * down, -12 * back])
    gates = [1.0, 4 * up * (1 - up), 4 * down * (1 - down), 4 * back * (1 - back)]
    assert result.metrics_T["gate"].tolist() == pytest.approx(gates)
    result.loss_T.sum().backward()
    expected = [-1.0, -gates[1] * 2, gates[2] * 2, -gates[3] * 0.5 * 3]  # -gate r A
    assert inputs.log_probs_T.grad.tolist() == pytest.approx(expected)


def test_agrees_with_verl_and_trl():
    loss = partial(sapo, options=SapoOptions())
    expected = (-0.0260236, 0.0636230, -0.0033551)
    assert measured(loss, golden_batch(), "sample_mean") == pytest.approx(expected, abs=1e-7)


def test_a_ratio_above_three_with_a_negative_advantage_is_bounded_without_a_dual_clip():
    inputs = inputs_of([math.log(4), math.log(40), 50.0], [-1.0, -1.0, -1.0])
    result = sapo(inputs, options=SapoOptions())
    assert result.loss_T.max().item() <= 4 / 1.05 + 1e-6
    result.loss_T.sum().backward()
    gradients = inputs.log_probs_T.grad.tolist()
    assert 0 < gradients[0] < 1  # pulled down still, and less than on-policy
    assert gradients[1:] == pytest.approx([0, 0], abs=1e-6)


@given(st.floats(-1000, 1000, width=32), st.floats(-5, 5, width=32))
def test_the_loss_is_bounded_and_pulls_the_way_of_the_advantage(log_ratio, advantage):
    inputs = inputs_of([log_ratio], [advantage])
    result = sapo(inputs, options=SapoOptions())
    assert abs(result.loss_T.item()) <= 4 * abs(advantage)
    result.loss_T.sum().backward()
    gradient = inputs.log_probs_T.grad.item()
    assert math.isfinite(gradient)
    assert gradient * advantage <= 0


@pytest.mark.parametrize("options", [{"tau_pos": 0.0}, {"tau_neg": -1.0}])
def test_impossible_temperatures_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SapoOptions(**options)
