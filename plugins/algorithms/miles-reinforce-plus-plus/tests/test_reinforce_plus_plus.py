"""REINFORCE++ against verl's and SkyRL's values, a recursion written out, and what must not change it."""

import math
from dataclasses import replace
from statistics import mean, variance

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_reinforce_plus_plus.plugin import ReinforcePlusPlusOptions
from miles_reinforce_plus_plus.reinforce_plus_plus import reinforce_plus_plus

from miles.testing.batches import cut_in_two, rollout_batch, select
from miles.toolkit import whiten


def advantages(inputs, gamma=1.0):
    return reinforce_plus_plus(inputs, options=ReinforcePlusPlusOptions(gamma))


def whitened(values):
    """By the definition: Bessel's variance, and 1e-8 added to it."""
    if len(values) < 2:
        return [0.0] * len(values)
    return [(v - mean(values)) / math.sqrt(variance(values) + 1e-8) for v in values]


def test_agrees_with_verl_and_skyrl(golden):
    first_N = advantages(golden)[golden.bounds[:-1]]
    high, low = 0.65437, -1.50504
    torch.testing.assert_close(first_N, torch.tensor([high, low, low, high, high, high, high, low]), atol=5e-6, rtol=0)


def test_the_same_batch_to_more_digits_by_hand(golden):
    # 46 of 66 tokens have the return 1: mean 46/66, variance 46/66 * 20/66 * 66/65
    std = math.sqrt(46 * 20 / (66 * 65))
    found = advantages(golden)
    assert float(found[0]) == pytest.approx(20 / 66 / std, abs=1e-6)
    assert float(found[12]) == pytest.approx(-46 / 66 / std, abs=1e-6)


def test_discount_and_kl_by_hand_and_environment_tokens_are_skipped(inputs_of):
    # two samples: actions 1, 2, 4 of the first (3 is the environment's), 6 of the second
    mask = [0, 1, 1, 0, 1, 0, 1]
    kl = [9.0, 1.0, 2.0, 9.0, -4.0, 9.0, 3.0]
    inputs = inputs_of([8.0, 2.0], [5, 2], mask=mask, kl=kl, kl_coef=0.5)
    last, alone = 8 + 2, 2 - 1.5
    middle = -1 + last / 2
    first = -0.5 + middle / 2
    a, b, c, d = whitened([first, middle, last, alone])
    torch.testing.assert_close(advantages(inputs, 0.5), torch.tensor([0, a, b, 0, c, 0, d]))


def test_siblings_are_pieces_of_one_episode_with_one_reward(inputs_of):
    kl, whole = [1.0, 0.5, 0.25, 2.0, 0.0], {"kl_coef": 0.1}
    uncut = inputs_of([3.0, 1.0], [4, 1], kl=kl, **whole)
    cut = inputs_of([3.0, 3.0, 1.0], [2, 2, 1], rollouts=[5, 5, 6], kl=kl, **whole)
    torch.testing.assert_close(advantages(cut, 0.9), advantages(uncut, 0.9))


def test_the_reward_waits_for_the_last_piece_that_can_be_trained(inputs_of):
    # the second sibling is masked: what it would have earned belongs to the last token of the first
    inputs = inputs_of([4.0, 4.0, 1.0], [2, 2, 1], rollouts=[5, 5, 6], mask=[1, 1, 0, 0, 1])
    a, b, c = whitened([2.0, 4.0, 1.0])
    torch.testing.assert_close(advantages(inputs, 0.5), torch.tensor([a, b, 0, 0, c]))


def test_a_trajectory_that_cannot_be_trained_has_no_say(inputs_of):
    inputs = inputs_of([1.0, 0.0, 100.0, 100.0], [1, 1, 2, 0], mask=[1, 1, 0, 0])
    a, b = whitened([1.0, 0.0])
    torch.testing.assert_close(advantages(inputs), torch.tensor([a, b, 0, 0]))


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1e6, 1e6, 1e6]])
def test_returns_that_agree_teach_nothing(rewards, inputs_of):
    assert advantages(inputs_of(rewards, [3, 7, 2])).abs().max() < 1e-5


def test_log_ratios_of_fifty_stay_finite(inputs_of):
    kl = [50.0, -50.0, math.expm1(20) - 20, 0.0]  # k1 at both ends, k3 at its bound, nothing
    found = advantages(inputs_of([1.0, 0.0], [2, 2], kl=kl, kl_coef=1.0))
    assert found.isfinite().all()
    assert float(found.std()) == pytest.approx(1, abs=1e-5)


def test_groups_have_no_say():
    inputs = rollout_batch()
    assert torch.equal(advantages(inputs), advantages(replace(inputs, group_N=torch.arange(7))))


def test_whitening_once_more_changes_nothing(golden):
    """So `normalize_advantages`, which slime asks for with this estimator, is harmless."""
    for inputs in (golden, rollout_batch()):
        once = advantages(inputs)
        torch.testing.assert_close(whiten(once, inputs.mask_T) * inputs.mask_T, once, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("spread", "enlarged"), [(1e-2, 1.000025), (1e-4, 1.5**0.5), (1e-6, 5001**0.5)])
def test_whitening_once_more_enlarges_returns_that_hardly_differ(spread, enlarged, inputs_of):
    """Returns of +-s have the variance v = 2 s^2; v / (v + 1e-8) once whitened: its root is left to divide by."""
    inputs = inputs_of([spread, -spread], [1, 1])
    once = advantages(inputs)
    assert float(whiten(once, inputs.mask_T)[0] / once[0]) == pytest.approx(enlarged, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_it_is_the_recursion_in_any_order(data):
    count = data.draw(st.integers(1, 6))
    rewards = data.draw(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    responses = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    gamma = data.draw(st.floats(0, 1))
    order = data.draw(st.permutations(range(count)))
    inputs = rollout_batch(rewards, [0] * count, responses)
    returns = {}
    for i in range(count):
        following = None
        for t in reversed(range(inputs.bounds[i], inputs.bounds[i + 1])):
            if inputs.mask_T[t]:
                ahead = rewards[i] if following is None else gamma * following
                returns[t] = following = ahead - inputs.kl_coef * float(inputs.kl_T[t])
    expected = torch.zeros(inputs.bounds[-1])
    expected[list(returns)] = torch.tensor(whitened(list(returns.values())))
    shuffled = select(inputs, order)
    placed = select(replace(inputs, kl_T=expected), order).kl_T
    torch.testing.assert_close(advantages(shuffled, gamma), placed, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.integers(0, 7), st.floats(0, 1))
def test_where_a_trajectory_is_cut_changes_nothing(sample, at, gamma):
    inputs = rollout_batch()
    at = min(at, inputs.bounds[sample + 1] - inputs.bounds[sample])
    torch.testing.assert_close(advantages(cut_in_two(inputs, sample, at), gamma), advantages(inputs, gamma))
