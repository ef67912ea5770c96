"""REINFORCE++-baseline against verl's values, numbers worked out by hand, and what must not change it."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_reinforce_plus_plus.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline

from miles.testing.batches import rollout_batch, select
from miles.toolkit import whiten


def test_agrees_with_verl(golden):
    first_N = reinforce_plus_plus_baseline(golden)[golden.bounds[:-1]]
    expected = [0.91712, -1.18827, -1.18827, 0.91712, 0.39077, 0.39077, 0.39077, -1.71462]
    torch.testing.assert_close(first_N, torch.tensor(expected), atol=5e-6, rtol=0)


def test_the_same_batch_to_more_digits_by_hand(golden):
    # tokens with reward minus mean 1/2, -1/2, 1/4, -3/4: 21, 10, 25, 10
    average = (21 / 2 - 10 / 2 + 25 / 4 - 10 * 3 / 4) / 66
    squares = 21 / 4 + 10 / 4 + 25 / 16 + 10 * 9 / 16
    std = math.sqrt((squares - 66 * average**2) / 65)
    found = reinforce_plus_plus_baseline(golden)
    for place, value in ((0, 1 / 2), (12, -1 / 2), (31, 1 / 4), (65, -3 / 4)):
        assert float(found[place]) == pytest.approx((value - average) / std, abs=1e-6)


def test_each_token_pays_its_own_kl(inputs_of):
    # relative rewards 1 and -1; tokens 1 - 0, 1 - 1, -1 - 0.5, and the environment's
    inputs = inputs_of([3.0, 1.0], [2, 2], mask=[1, 1, 1, 0], kl=[0.0, 2.0, 1.0, math.nan], kl_coef=0.5)
    values = torch.tensor([1.0, 0.0, -1.5])
    expected = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(reinforce_plus_plus_baseline(inputs), torch.cat([expected, torch.zeros(1)]))


def test_a_group_that_agrees_stands_at_the_mean_of_the_tokens(inputs_of):
    # right answer of 3 tokens, wrong of 1: the mean over tokens is (3 - 1) / 2 / 6, not 0
    inputs = inputs_of([1.0, 0.0, 0.1, 0.1], [3, 1, 1, 1], groups=[0, 0, 1, 1])
    found = reinforce_plus_plus_baseline(inputs)
    average = 1 / 6
    std = math.sqrt((4 / 4 - 6 * average**2) / 5)
    torch.testing.assert_close(found[4:], torch.full((2,), -average / std))


def test_siblings_of_one_trajectory_count_once(inputs_of):
    # trajectories 1 (two samples), 0, 0: mean 1/3, where counting samples would give 1/2
    found = reinforce_plus_plus_baseline(inputs_of([1, 1, 0, 0], [1, 1, 1, 1], rollouts=[10, 10, 11, 12]))
    values = torch.tensor([2.0, 2.0, -1.0, -1.0]) / 3
    torch.testing.assert_close(found, (values - values.mean()) / (values.var() + 1e-8).sqrt())


@pytest.mark.parametrize("groups", [[0, 0, 0], [0, 1, 2]])
def test_groups_that_agree_and_groups_of_one_teach_nothing(groups, inputs_of):
    assert reinforce_plus_plus_baseline(inputs_of([0.1, 0.1, 0.1], [3, 7, 2], groups)).abs().max() < 1e-6


def test_log_ratios_of_fifty_stay_finite(inputs_of):
    kl = [50.0, -50.0, math.expm1(20) - 20, 0.0]  # k1 at both ends, k3 at its bound, nothing
    found = reinforce_plus_plus_baseline(inputs_of([1.0, 0.0], [2, 2], kl=kl, kl_coef=1.0))
    assert found.isfinite().all()


def test_whitening_once_more_changes_nothing(golden):
    for inputs in (golden, rollout_batch()):
        once = reinforce_plus_plus_baseline(inputs)
        torch.testing.assert_close(whiten(once, inputs.mask_T) * inputs.mask_T, once, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_order_environment_tokens_and_level_of_rewards_have_no_say(data):
    count = data.draw(st.integers(1, 8))
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count, max_size=count))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    responses = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    inputs = rollout_batch(rewards, groups, responses)
    whole = reinforce_plus_plus_baseline(inputs)
    noisy = replace(inputs, kl_T=torch.where(inputs.mask_T > 0, inputs.kl_T, 1e6), rewards_N=inputs.rewards_N + 8)
    torch.testing.assert_close(reinforce_plus_plus_baseline(noisy), whole, atol=1e-5, rtol=1e-5)
    placed = select(replace(inputs, kl_T=whole), order).kl_T
    torch.testing.assert_close(reinforce_plus_plus_baseline(select(inputs, order)), placed, atol=1e-5, rtol=1e-5)
