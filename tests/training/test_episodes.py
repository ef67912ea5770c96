"""Actions in the order of time, and their discounted sums, against recursions written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.testing.batches import rollout_batch
from miles.toolkit import Episodes, discounted_sums, kl_cost
from miles.types import AdvantageInputs


def inputs_of(mask, lengths, rollouts, kl=None):
    count = len(lengths)
    return AdvantageInputs(
        rewards_N=torch.zeros(count, dtype=torch.float64),
        mask_T=torch.tensor(mask, dtype=torch.float32),
        bounds=[0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()],
        group_N=torch.zeros(count, dtype=torch.int64),
        rollout_N=torch.tensor(rollouts, dtype=torch.int64),
        kl_T=None if kl is None else torch.tensor(kl),
        kl_coef=0.0 if kl is None else 0.5,
    )


# trajectory 7 is cut into samples 0 and 2, of which the second is masked at its end; trajectory 3 is sample 1
CUT = inputs_of([0, 1, 1, 0, 1, 1, 0, 1, 0], lengths=[3, 2, 4], rollouts=[7, 3, 7])


def test_pieces_of_a_trajectory_follow_each_other_and_environment_tokens_are_skipped():
    episodes = Episodes.of(CUT)
    assert episodes.place_K.tolist() == [4, 1, 2, 5, 7]  # trajectory 3, then 7 with both pieces
    assert episodes.sample_K.tolist() == [1, 0, 0, 2, 2]
    assert episodes.last_K.tolist() == [True, False, False, False, True]


def test_discounted_sums_by_hand():
    episodes = Episodes.of(CUT)
    sums = discounted_sums(torch.tensor([10.0, 1, 2, 3, 4]), episodes.episode_K, 0.5)
    assert sums.tolist() == [10, 1 + 2 / 2 + 3 / 4 + 4 / 8, 2 + 3 / 2 + 4 / 4, 3 + 4 / 2, 4]
    assert episodes.per_token(sums, 9).tolist() == [0, 3.25, 4.5, 0, 10, 5, 0, 4, 0]


@pytest.mark.parametrize(("factor", "expected"), [(0.0, [1, 2, 3]), (1.0, [6, 5, 3])])
def test_no_and_full_weight_of_the_future(factor, expected):
    assert discounted_sums(torch.tensor([1.0, 2, 3]), torch.tensor([5, 5, 5]), factor).tolist() == expected


@pytest.mark.parametrize(("mask", "lengths"), [([], []), ([], [0]), ([0, 0], [2])])
def test_without_an_action_there_is_no_episode(mask, lengths):
    episodes = Episodes.of(inputs_of(mask, lengths, list(range(len(lengths)))))
    assert episodes.last_K.tolist() == []
    assert discounted_sums(torch.zeros(0), episodes.episode_K, 0.9).tolist() == []
    assert episodes.per_token(torch.zeros(0), len(mask)).tolist() == [0.0] * len(mask)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_discounted_sums_are_the_recursion(data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    rollouts = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths)))
    values = data.draw(st.lists(st.floats(-9, 9), min_size=sum(lengths), max_size=sum(lengths)))
    factor = data.draw(st.floats(0, 1))
    inputs = inputs_of(mask, lengths, rollouts)
    episodes = Episodes.of(inputs)
    values_K = torch.tensor(values, dtype=torch.float64)[episodes.place_K]
    found = episodes.per_token(discounted_sums(values_K, episodes.episode_K, factor), sum(lengths))
    expected, running = [0.0] * sum(lengths), dict.fromkeys(rollouts, 0.0)
    for sample in reversed(range(len(lengths))):
        for t in reversed(range(inputs.bounds[sample], inputs.bounds[sample + 1])):
            if mask[t]:
                running[rollouts[sample]] = values[t] + factor * running[rollouts[sample]]
                expected[t] = running[rollouts[sample]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_kl_costs_on_trainable_tokens_alone():
    inputs = inputs_of([0, 1, 0, 1], [4], [0], kl=[9.0, 2.0, float("nan"), -4.0])
    assert kl_cost(inputs).tolist() == [0, 1, 0, -2]


def test_kl_costs_nothing_without_a_coefficient():
    inputs = inputs_of([1, 1], [2], [0])
    assert kl_cost(inputs).tolist() == [0, 0]
    assert kl_cost(rollout_batch([], [], [])).tolist() == []
