"""GAE against hand-worked numbers, a plain recursion written here, and the invariances of a rollout batch."""

import time
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_ppo.gae import gae
from miles_ppo.plugin import GaeOptions

from miles.api import AdvantageInputs, TrainError

NAN = float("nan")


def inputs_of(rewards, masks, values, rollouts=None, kl=None, kl_coef=0.0):
    """A batch from one list a sample of masks, values and KL."""
    return AdvantageInputs(
        rewards_N=torch.tensor(rewards, dtype=torch.float64),
        mask_T=torch.tensor([float(m) for mask in masks for m in mask]),
        bounds=[0, *accumulate(map(len, masks))],
        group_N=torch.zeros(len(rewards), dtype=torch.int64),
        rollout_N=torch.tensor(rollouts or range(len(rewards))),
        values_T=torch.tensor([float(v) for row in values for v in row]),
        kl_T=None if kl is None else torch.tensor([float(v) for row in kl for v in row]),
        kl_coef=kl_coef,
    )


def recursion(inputs, options):
    """The formula, token by token: advantages and returns of the whole batch as lists."""
    mask, values = inputs.mask_T.tolist(), inputs.values_T.tolist()
    kl = inputs.kl_T.tolist() if inputs.kl_T is not None else [0.0] * len(mask)
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for i, reward in enumerate(inputs.rewards_N.tolist()):
        later, following = 0.0, 0.0
        for t in reversed(range(inputs.bounds[i], inputs.bounds[i + 1])):
            if mask[t]:
                delta = reward - inputs.kl_coef * kl[t] + options.gamma * following - values[t]
                advantages[t] = later = delta + options.gamma * options.lam * later
                returns[t] = later + values[t]
                reward, following = 0.0, values[t]
    return advantages, returns


def random_inputs(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return AdvantageInputs(
        rewards_N=torch.randn(len(lengths), dtype=torch.float64, generator=generator),
        mask_T=(torch.rand(total, generator=generator) < 0.8).float(),
        bounds=[0, *accumulate(lengths)],
        group_N=torch.zeros(len(lengths), dtype=torch.int64),
        rollout_N=torch.arange(len(lengths)),
        values_T=torch.randn(total, generator=generator),
        kl_T=torch.randn(total, generator=generator),
        kl_coef=0.1,
    )


# --------------------------------------------------------------------------------------------------------- by hand


def test_environment_tokens_are_skipped():
    # V = 1, 3, 4 on the model's tokens; gamma = lam = 1/2, R = 2
    # d3 = 2 - 4 = -2        A3 = -2
    # d2 = 4/2 - 3 = -1      A2 = -1 - 2/4 = -1.5
    # d1 = 3/2 - 1 = 0.5     A1 = 0.5 - 1.5/4 = 0.125
    inputs = inputs_of([2], [[0, 0, 1, 1, 0, 0, 1, 0]], [[7, 7, 1, 3, 7, 7, 4, 7]])
    found = gae(inputs, options=GaeOptions(gamma=0.5, lam=0.5))
    assert found.advantages_T.tolist() == [0, 0, 0.125, -1.5, 0, 0, -2, 0]
    assert found.returns_T.tolist() == [0, 0, 1.125, 1.5, 0, 0, 2, 0]


def test_two_packed_samples():
    # gamma = lam = 1: the return is the reward, everywhere
    inputs = inputs_of([1, -1], [[0, 1, 1], [0, 1, 0, 1, 1]], [[0, 0.25, 0.5], [0, 0.5, 9, -0.5, 0]])
    found = gae(inputs, options=GaeOptions())
    assert found.advantages_T.tolist() == [0, 0.75, 0.5, 0, -1.5, 0, -0.5, -1]
    assert found.returns_T.tolist() == [0, 1, 1, 0, -1, 0, -1, -1]


def test_lam_0_looks_one_value_ahead():
    inputs = inputs_of([1], [[1, 1, 1]], [[0.25, 0.5, 0.75]])
    found = gae(inputs, options=GaeOptions(gamma=0.5, lam=0.0))
    assert found.advantages_T.tolist() == [0, -0.125, 0.25]
    assert found.returns_T.tolist() == [0.25, 0.375, 1]


def test_kl_is_paid_where_it_arises():
    # r = -0.5, -1, 4 - 1.5; the environment's KL of 100 is nobody's
    inputs = inputs_of([4], [[0, 1, 0, 1, 1]], [[0] * 5], kl=[[100, 1, 100, 2, 3]], kl_coef=0.5)
    found = gae(inputs, options=GaeOptions())
    assert found.advantages_T.tolist() == [0, 1, 0, 1.5, 2.5]
    assert torch.equal(found.returns_T, found.advantages_T)


def test_each_sibling_ends_with_the_reward():
    # gamma = lam = 1/2; each sibling's last token is worth 2 less its value, whatever follows in the other
    inputs = inputs_of([2, 2], [[1, 1], [0, 1]], [[0, 1], [9, 1]], rollouts=[5, 5])
    found = gae(inputs, options=GaeOptions(gamma=0.5, lam=0.5))
    assert found.advantages_T.tolist() == [0.75, 1, 0, 1]
    assert found.returns_T.tolist() == [0.75, 2, 0, 2]


def test_a_sample_without_trainable_tokens_is_zero_and_its_reward_goes_nowhere():
    inputs = inputs_of([5, 1, 7], [[0, 0], [0, 1], []], [[3, 3], [3, 0.5], []])
    found = gae(inputs, options=GaeOptions())
    assert found.advantages_T.tolist() == [0, 0, 0, 0.5]
    assert found.returns_T.tolist() == [0, 0, 0, 1]


# ------------------------------------------------------------------------------------------ against another method


@pytest.mark.parametrize("size", [0, 1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.0), (1.0, 0.95), (0.95, 1.0), (1.0, 1.0)])
def test_one_sample_of_any_length_is_the_recursion(size, gamma, lam):
    inputs, options = random_inputs([size], seed=size), GaeOptions(gamma=gamma, lam=lam)
    inputs = replace(inputs, mask_T=torch.ones(size))
    torch.testing.assert_close(gae(inputs, options=options).advantages_T, torch.tensor(recursion(inputs, options)[0]))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 127, 128, 129]), max_size=6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_the_recursion(lengths, gamma, lam, seed):
    inputs, options = random_inputs(lengths, seed), GaeOptions(gamma=gamma, lam=lam)
    found, expected = gae(inputs, options=options), recursion(inputs, options)
    for found_T, expected_T in zip((found.advantages_T, found.returns_T), expected, strict=True):
        torch.testing.assert_close(found_T, torch.tensor(expected_T), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 2**32), data=st.data())
def test_what_a_sample_is_packed_with_does_not_matter(lengths, seed, data):
    """Bit for bit."""
    inputs, options = random_inputs(lengths, seed), GaeOptions(gamma=0.99, lam=0.95)
    i = data.draw(st.integers(0, len(lengths) - 1))
    start, end = inputs.bounds[i], inputs.bounds[i + 1]
    alone = replace(
        inputs,
        rewards_N=inputs.rewards_N[[i]],
        mask_T=inputs.mask_T[start:end],
        bounds=[0, end - start],
        values_T=inputs.values_T[start:end],
        kl_T=inputs.kl_T[start:end],
    )
    packed, single = gae(inputs, options=options), gae(alone, options=options)
    assert torch.equal(packed.advantages_T[start:end], single.advantages_T)
    assert torch.equal(packed.returns_T[start:end], single.returns_T)


# ---------------------------------------------------------------------------------------------------------- extremes


def test_huge_rewards_stay_finite_and_in_their_sample():
    masks, values = [[1, 1, 1]] * 3, [[0.1, 0.2, 0.3]] * 3
    found = gae(inputs_of([1e30, 1, -1e30], masks, values), options=GaeOptions())
    assert found.advantages_T.isfinite().all()
    assert found.returns_T.isfinite().all()
    torch.testing.assert_close(found.returns_T, torch.tensor([1e30] * 3 + [1.0] * 3 + [-1e30] * 3))
    alone = gae(inputs_of([1], masks[:1], values[:1]), options=GaeOptions())
    assert torch.equal(found.advantages_T[3:6], alone.advantages_T)


def test_a_million_tokens_take_under_a_second():
    """About a tenth of one, of the processor's time: no loop runs over tokens."""
    inputs = random_inputs([32_000] * 32, seed=0)
    started = time.process_time()
    found = gae(inputs, options=GaeOptions(gamma=1.0, lam=0.95))
    assert time.process_time() - started < 1
    assert found.advantages_T.isfinite().all()


def test_values_that_are_missing_are_a_clear_error():
    inputs = replace(inputs_of([1], [[1]], [[0]]), values_T=None)
    with pytest.raises(TrainError, match="values of a critic, and there are none"):
        gae(inputs, options=GaeOptions())


def test_values_that_are_not_finite_are_a_clear_error_where_they_count():
    with pytest.raises(TrainError, match="1 of 2 values of the critic are not finite"):
        gae(inputs_of([1], [[0, 1, 1]], [[0, NAN, 0]]), options=GaeOptions())
    found = gae(inputs_of([1], [[0, 1, 0]], [[NAN, 0, NAN]]), options=GaeOptions())
    assert found.advantages_T.tolist() == [0, 1, 0]
