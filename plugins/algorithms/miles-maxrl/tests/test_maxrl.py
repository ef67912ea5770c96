"""MaxRL by hand, what it refuses, and what must not change it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_maxrl.maxrl import maxrl

from miles.api import TrainError
from miles.testing.batches import rollout_batch, select


def batch_of(rewards, groups, responses=None, rollouts=None):
    """Samples of one trainable token unless `responses` says otherwise; no KL penalty."""
    batch = rollout_batch(rewards, groups, responses or [1] * len(rewards))
    rollout_N = batch.rollout_N if rollouts is None else torch.tensor(rollouts)
    return replace(batch, rollout_N=rollout_N, kl_T=None, kl_coef=0.0)


def advantages_of(rewards, groups, rollouts=None):
    batch = batch_of(rewards, groups, rollouts=rollouts)
    return maxrl(batch)[batch.mask_T > 0].tolist()


def test_by_hand():
    # one success of four: (1 - 1/4) / (1/4) = 3; three of four: 1/3
    assert advantages_of([1, 0, 0, 0], [0] * 4) == [3, -1, -1, -1]
    assert advantages_of([1, 1, 1, 0], [0] * 4) == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1])
    assert advantages_of([1, 0.5, 0, 6, 2], [4, 4, 4, 2, 2]) == [1, 0, -1, 0.5, -0.5]


@pytest.mark.parametrize("rewards", [[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [0.0], [1.0]])
def test_failures_only_rewards_that_agree_and_a_group_of_one_give_exactly_zero(rewards):
    assert advantages_of(rewards, [0] * len(rewards)) == [0] * len(rewards)


def test_spread_over_trainable_tokens_only():
    batch = batch_of([1, 0], [5, 5], responses=[5, 2])  # two prompt tokens each, and an environment token
    assert maxrl(batch).tolist() == [0, 0, 1, 1, 1, 0, 1, 0, 0, -1, -1]


def test_siblings_of_one_trajectory_count_once():
    # trajectories 1 (two samples), 0, 0: mean 1/3, where counting samples would give 1/2
    assert advantages_of([1, 1, 0, 0], [0] * 4, rollouts=[10, 10, 11, 12]) == pytest.approx([2, 2, -1, -1])


def test_each_token_pays_its_own_kl_and_rewards_stay_as_they_are():
    batch = batch_of([1, 0], [5, 5], responses=[2, 1])
    kl_T = torch.tensor([9, 9, 0.5, -1, 9, 9, 2])
    found = maxrl(replace(batch, kl_T=kl_T, kl_coef=0.1))
    torch.testing.assert_close(found, torch.tensor([0, 0, 0.95, 1.1, 0, 0, -1.2]))


def test_negative_rewards_are_refused_by_name():
    batch = batch_of([1, -1, -0.5, -0.5, 0], [0] * 5, rollouts=[20, 21, 22, 22, 23])
    with pytest.raises(TrainError, match=r"2 rewards are negative, such as -1 of rollout 21, -0\.5 of rollout 22: use"):
        maxrl(batch)


@pytest.mark.parametrize(
    "batch",
    [
        rollout_batch(groups=range(7)),
        rollout_batch(rewards=[0.1] * 7),
        rollout_batch(rewards=[0.1, 0.1 + 1e-7] * 3 + [0.1]),
        rollout_batch(rewards=[1e6, 0.0] * 3 + [1e-6]),
        rollout_batch(rewards=[5e-324, 0.0] * 3 + [0.0]),
        rollout_batch(responses=[0] * 7),
        rollout_batch([1.0], [0], [3]),
        rollout_batch([], [], []),
    ],
    ids=["groups of one", "agree", "nearly agree", "huge", "tiny", "no trainable token", "one sample", "no sample"],
)
def test_degenerate_batches_are_finite(batch):
    found = maxrl(batch)
    assert found.shape == batch.mask_T.shape
    assert found.isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_it_is_the_quotient_in_any_order_among_any_groups_and_bounded(data):
    count = data.draw(st.integers(1, 12))
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=count, max_size=count))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    shuffled = select(batch_of(rewards, groups), order)
    found = maxrl(shuffled)[shuffled.mask_T > 0].tolist()
    for i, advantage in zip(order, found, strict=True):
        peers = [rewards[j] for j in range(count) if groups[j] == groups[i]]
        mean = sum(peers) / len(peers)
        assert advantage == pytest.approx((rewards[i] - mean) / mean if mean else 0, abs=1e-6)
        assert -1 <= advantage <= len(peers) - 1 + 1e-6
