"""Policy losses against hand-worked numbers and against values on which verl, TRL, AReaL and SkyRL agree."""

import math
from functools import partial

import pytest
import torch

from miles.api import ConfigError, LossInputs
from miles.builtins.losses import ppo_clip, reinforce, sft
from miles.builtins.options import PpoClipOptions
from miles.testing import golden_batch, measured


def inputs_for(ratios, advantages):
    new_T = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True)
    old_T = torch.zeros(len(ratios), dtype=torch.float64)
    advantages_T = torch.tensor(advantages, dtype=torch.float64)
    return LossInputs(new_T, old_T, advantages_T, torch.ones(len(ratios)), [0, len(ratios)])


def test_ppo_clip_by_hand():
    inputs = inputs_for([1.0, 1.5, 1.5, 0.5, 0.5], [2.0, 2.0, -2.0, 2.0, -2.0])
    result = ppo_clip(inputs, options=PpoClipOptions(eps=0.2, eps_high=0.3))
    # unclipped; clipped high at 1.3; pessimistic -rA; pessimistic -rA; clipped low at 0.8
    torch.testing.assert_close(result.loss_T, torch.tensor([-2.0, -2.6, 3.0, -1.0, 1.6], dtype=torch.float64))
    assert result.metrics_T["pg_clipfrac"].tolist() == [0, 1, 0, 0, 1]
    assert result.metrics_T["pg_clipfrac_high"].tolist() == [0, 1, 0, 0, 0]
    assert result.metrics_T["pg_clipfrac_low"].tolist() == [0, 0, 0, 0, 1]
    torch.testing.assert_close(result.metrics_T["ratio"], torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5]))
    torch.testing.assert_close(result.metrics_T["ppo_kl"], -torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5]).log())
    result.loss_T.sum().backward()
    # d/dlp of -rA is -rA where the clip is inactive and 0 where it is active
    expected = torch.tensor([-2.0, 0.0, 3.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(inputs.log_probs_T.grad, expected)


def test_eps_high_defaults_to_eps():
    result = ppo_clip(inputs_for([2.0], [1.0]), options=PpoClipOptions(eps=0.1))
    assert result.loss_T.item() == pytest.approx(-1.1)


def test_dual_clip_bounds_only_negative_advantages_with_a_large_ratio():
    inputs = inputs_for([5.0, 5.0, 2.0, 0.5], [-2.0, 2.0, -2.0, -2.0])
    result = ppo_clip(inputs, options=PpoClipOptions(eps=0.2, eps_clip_c=3.0))
    torch.testing.assert_close(result.loss_T, torch.tensor([6.0, -2.4, 4.0, 1.6], dtype=torch.float64))
    assert result.metrics_T["pg_clipfrac_dual"].tolist() == [1, 0, 0, 0]
    result.loss_T.sum().backward()
    torch.testing.assert_close(inputs.log_probs_T.grad, torch.tensor([0.0, 0.0, 4.0, 0.0], dtype=torch.float64))


def test_a_huge_log_ratio_stays_finite():
    inputs = LossInputs(torch.tensor([0.0]), torch.tensor([-500.0]), torch.tensor([-1.0]), torch.ones(1), [0, 1])
    result = ppo_clip(inputs, options=PpoClipOptions())
    assert result.loss_T.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_metrics_carry_no_gradient():
    result = ppo_clip(inputs_for([1.1], [1.0]), options=PpoClipOptions(eps_clip_c=3.0))
    assert not any(value.requires_grad for value in result.metrics_T.values())


@pytest.mark.parametrize("options", [{"eps": 1.5}, {"eps": -0.1}, {"eps_high": -1.0}, {"eps_clip_c": 1.0}])
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PpoClipOptions(**options)


def test_reinforce_and_sft_by_hand():
    inputs = inputs_for([0.5, 0.25], [2.0, -1.0])
    torch.testing.assert_close(
        reinforce(inputs).loss_T, torch.tensor([2 * math.log(2), -math.log(4)], dtype=torch.float64)
    )
    torch.testing.assert_close(sft(inputs).loss_T, torch.tensor([math.log(2), math.log(4)], dtype=torch.float64))


@pytest.mark.parametrize(
    ("aggregation", "constant", "expected"),
    [
        ("token_mean", None, (-0.0597958, 0.0534834, -0.0050203)),  # verl, TRL (dapo), AReaL, SkyRL
        ("sample_mean", None, (0.0085547, 0.0591540, -0.0034514)),  # verl, TRL (grpo), SkyRL, slime
        ("constant", 12.0, (-0.0411096, 0.0367698, -0.0034514)),  # verl, TRL (dr_grpo), SkyRL
    ],
)
def test_ppo_clip_agrees_with_other_frameworks(aggregation, constant, expected):
    loss = partial(ppo_clip, options=PpoClipOptions(eps=0.2, eps_high=0.28))
    assert measured(loss, golden_batch(), aggregation, constant) == pytest.approx(expected, abs=1e-7)


def test_where_other_frameworks_part_dual_clip_is_an_option():
    """At r > 3 and A < 0 verl's loss is 3 |A| in any case; TRL's and ours is r |A| unless a bound is asked for."""
    inputs = golden_batch()
    inputs.log_probs_T = torch.where(inputs.advantages_T < 0, inputs.old_log_probs_T + math.log(4), inputs.log_probs_T)
    free, free_norm, _ = measured(partial(ppo_clip, options=PpoClipOptions()), inputs)
    bounded, bounded_norm, _ = measured(partial(ppo_clip, options=PpoClipOptions(eps_clip_c=3)), inputs)
    negative = (0.5 + 0.5 + 0.75) / 8  # |A| of three of the eight samples
    assert free - bounded == pytest.approx((4 - 3) * negative, abs=1e-6)
    assert bounded_norm < free_norm
