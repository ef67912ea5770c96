"""RLOO against verl's and SkyRL's values, the definition written out, and what must not change it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_rloo.rloo import rloo

from miles.testing.batches import rollout_batch, select


def advantages_of(rewards, groups, rollouts=None):
    """One value a sample, from samples of one trainable token."""
    batch = rollout_batch(rewards, groups, [1] * len(rewards))
    if rollouts is not None:
        batch = replace(batch, rollout_N=torch.tensor(rollouts))
    return rloo(batch)[batch.mask_T > 0]


def test_agrees_with_verl_and_skyrl():
    found = advantages_of([1, 0, 0, 1, 1, 1, 1, 0], [0] * 4 + [1] * 4)
    expected = torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, -1.0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_by_hand():
    # 5 - (1 + 3) / 2, 1 - (5 + 3) / 2, 3 - (5 + 1) / 2; and a pair: each minus the other
    assert advantages_of([5, 1, 3, 2, 7], [0, 0, 0, 1, 1]).tolist() == [3, -3, 0, -5, 5]


def test_spread_over_trainable_tokens_only():
    batch = rollout_batch([2.0, 0.5], [5, 5], [5, 2])  # two prompt tokens each, and an environment token
    assert rloo(batch).tolist() == [0, 0, 1.5, 1.5, 1.5, 0, 1.5, 0, 0, -1.5, -1.5]


def test_a_group_of_one_and_one_that_agrees_give_exactly_zero():
    # 0.1 is not a binary fraction: the mean of three differs from it by rounding unless agreement is seen
    assert advantages_of([0.7, 0.1, 0.1, 0.1], [3, 8, 8, 8]).tolist() == [0, 0, 0, 0]


def test_siblings_of_one_trajectory_count_once():
    # trajectories 1 (two samples), 0, 0.5; counting samples would give 3 others
    found = advantages_of([1, 1, 0, 0.5], [0] * 4, rollouts=[10, 10, 11, 12])
    assert found.tolist() == [0.75, 0.75, -0.75, 0]
    assert advantages_of([1, 1], [0, 0], rollouts=[4, 4]).tolist() == [0, 0]  # one trajectory has no others


@pytest.mark.parametrize("shift", [50.0, -50.0])
def test_log_probabilities_have_no_say(shift):
    batch = rollout_batch()
    far = replace(batch, old_log_probs_T=batch.old_log_probs_T + shift, ref_log_probs_T=None, kl_T=None)
    assert torch.equal(rloo(far), rloo(batch))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_it_is_the_mean_of_the_others_in_any_order_among_any_groups(data):
    count = data.draw(st.integers(1, 12))
    rewards = data.draw(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    expected = []
    for i in order:
        others = [rewards[j] for j in range(count) if groups[j] == groups[i] and j != i]
        expected.append(rewards[i] - sum(others) / len(others) if others else 0.0)
    shuffled = select(rollout_batch(rewards, groups, [1] * count), order)
    torch.testing.assert_close(rloo(shuffled)[shuffled.mask_T > 0], torch.tensor(expected), atol=1e-5, rtol=1e-5)
