"""GRPO and Dr. GRPO against hand-worked numbers, verl's and SkyRL's values, and the invariances of numerics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_grpo.grpo import dr_grpo, grpo
from miles_grpo.plugin import GrpoOptions

from miles.api import AdvantageInputs, ConfigError


def inputs_of(rewards, groups, rollouts=None, lengths=None, mask=None):
    lengths = lengths or [1] * len(rewards)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return AdvantageInputs(
        rewards_N=torch.tensor(rewards, dtype=torch.float32),
        mask_T=torch.ones(bounds[-1]) if mask is None else torch.tensor(mask, dtype=torch.float32),
        bounds=bounds,
        group_N=torch.tensor(groups),
        rollout_N=torch.tensor(rollouts if rollouts is not None else list(range(len(rewards)))),
    )


def test_agrees_with_verl_and_skyrl():
    inputs = inputs_of([1, 0, 0, 1, 1, 1, 1, 0], [0] * 4 + [1] * 4)
    expected = torch.tensor([0.86602, -0.86602, -0.86602, 0.86602, 0.5, 0.5, 0.5, -1.5])
    torch.testing.assert_close(grpo(inputs, options=GrpoOptions()), expected, atol=1e-5, rtol=0)


def test_dr_grpo_by_hand():
    inputs = inputs_of([1, 0, 0, 1, 1, 1, 1, 0], [0] * 4 + [1] * 4)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75])
    torch.testing.assert_close(dr_grpo(inputs), expected)
    torch.testing.assert_close(grpo(inputs, options=GrpoOptions(normalize_std=False)), expected)


def test_spread_over_trainable_tokens_only():
    inputs = inputs_of([2, 0], [5, 5], lengths=[3, 4], mask=[0, 1, 1, 0, 1, 0, 1])
    a = 2**-0.5  # deviation 1 over std sqrt(2)
    expected = torch.tensor([0, a, a, 0, -a, 0, -a])
    torch.testing.assert_close(grpo(inputs, options=GrpoOptions(epsilon=0.0)), expected)


def test_epsilon_is_added_to_the_deviation():
    inputs = inputs_of([1, 0], [0, 0])
    value = 0.5 / (0.5**0.5 + 0.1)
    torch.testing.assert_close(grpo(inputs, options=GrpoOptions(epsilon=0.1)), torch.tensor([value, -value]))


@pytest.mark.parametrize("estimator", [lambda i: grpo(i, options=GrpoOptions()), dr_grpo], ids=["grpo", "dr_grpo"])
def test_a_group_of_one_and_one_that_agrees_give_exactly_zero(estimator):
    # 0.1 is not a binary fraction: the mean of three differs from it by rounding unless agreement is seen
    inputs = inputs_of([0.7, 0.1, 0.1, 0.1], [3, 8, 8, 8])
    assert estimator(inputs).tolist() == [0, 0, 0, 0]


def test_siblings_of_one_trajectory_count_once():
    # trajectories: 1 (two siblings), 0, 0 -> mean 1/3; counting samples instead would give 1/2
    inputs = inputs_of([1, 1, 0, 0], [0, 0, 0, 0], rollouts=[10, 10, 11, 12])
    third = 1 / 3
    torch.testing.assert_close(dr_grpo(inputs), torch.tensor([2 * third, 2 * third, -third, -third]))
    std = 3**-0.5
    expected = torch.tensor([2 * third, 2 * third, -third, -third]) / std
    torch.testing.assert_close(grpo(inputs, options=GrpoOptions(epsilon=0.0)), expected)


def test_a_group_left_with_one_trajectory_gives_zero_even_with_siblings():
    inputs = inputs_of([1, 1], [0, 0], rollouts=[4, 4])
    assert grpo(inputs, options=GrpoOptions()).tolist() == [0, 0]


def test_an_empty_batch_is_empty():
    assert grpo(inputs_of([], []), options=GrpoOptions()).tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_order_of_samples_and_other_groups_do_not_matter(data):
    count = data.draw(st.integers(1, 12))
    rewards = data.draw(st.lists(st.floats(-10, 10, width=32), min_size=count, max_size=count))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    whole = grpo(inputs_of(rewards, groups), options=GrpoOptions())
    shuffled = grpo(inputs_of([rewards[i] for i in order], [groups[i] for i in order]), options=GrpoOptions())
    torch.testing.assert_close(shuffled, whole[list(order)], atol=1e-4, rtol=1e-4)
    alone = [i for i in range(count) if groups[i] == groups[0]]
    part = grpo(inputs_of([rewards[i] for i in alone], [0] * len(alone)), options=GrpoOptions())
    torch.testing.assert_close(part, whole[alone], atol=1e-4, rtol=1e-4)


def test_a_negative_epsilon_is_refused():
    with pytest.raises(ConfigError, match="epsilon"):
        GrpoOptions(epsilon=-1.0)
