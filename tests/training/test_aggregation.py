"""Averages as token weights, against numbers worked out by hand; and what must not change them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.training.aggregation import mean_per_sample, sample_index, spread_over_samples, sum_per_sample, token_weights

# Two samples of 3 and 2 tokens; trainable: 2 of the first, 1 of the second. Losses 1 2 3 | 4 5.
MASK = torch.tensor([0.0, 1, 1, 0, 1])
LOSS = torch.tensor([1.0, 2, 3, 4, 5])
BOUNDS = [0, 3, 5]
APART = torch.tensor([10, 11])


@pytest.mark.parametrize(
    ("aggregation", "constant", "expected"),
    [
        ("sample_mean", None, ((2 + 3) / 2 + 5) / 2),
        ("token_mean", None, (2 + 3 + 5) / 3),
        ("constant", 4.0, (2 + 3 + 5) / (2 * 4)),
        ("sequence_sum", None, (2 + 3 + 5) / 2),
    ],
)
def test_each_average(aggregation, constant, expected):
    weights = token_weights(MASK, BOUNDS, APART, aggregation, constant)
    assert float((weights * LOSS).sum()) == pytest.approx(expected)


def test_siblings_of_one_trajectory_share_a_denominator_and_count_once():
    weights = token_weights(MASK, BOUNDS, torch.tensor([10, 10]), "sample_mean")
    assert float((weights * LOSS).sum()) == pytest.approx((2 + 3 + 5) / 3)
    assert float((token_weights(MASK, BOUNDS, torch.tensor([10, 10]), "sequence_sum") * LOSS).sum()) == 10


def test_a_fully_masked_sample_counts_as_a_rollout_but_adds_nothing():
    weights = token_weights(torch.tensor([1.0, 1, 0, 0]), [0, 2, 4], APART, "sample_mean")
    assert weights.tolist() == [0.25, 0.25, 0, 0]


def test_nothing_trainable_gives_zeros_not_nan():
    for aggregation in ("sample_mean", "token_mean", "sequence_sum"):
        assert token_weights(torch.zeros(4), [0, 2, 4], APART, aggregation).tolist() == [0, 0, 0, 0]


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6),
    st.sampled_from(["sample_mean", "token_mean", "constant", "sequence_sum"]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_samples_does_not_matter(masks, aggregation, rng):
    def weights_by_sample(order):
        mask = torch.tensor([float(m) for i in order for m in masks[i]])
        bounds = [0]
        for i in order:
            bounds.append(bounds[-1] + len(masks[i]))
        flat = token_weights(mask, bounds, torch.tensor([100 + i // 2 for i in order]), aggregation, 7.0)
        return {i: flat[bounds[k] : bounds[k + 1]].tolist() for k, i in enumerate(order)}

    order = list(range(len(masks)))
    before = weights_by_sample(order)
    rng.shuffle(order)
    assert weights_by_sample(order) == before


def test_sum_per_sample_is_differentiable():
    values = torch.tensor([1.0, 2, 3], requires_grad=True)
    sums = sum_per_sample(values, [0, 2, 3])
    assert sums.tolist() == [3, 3]
    (sums * torch.tensor([1.0, 10.0])).sum().backward()
    assert values.grad.tolist() == [1, 1, 10]


def test_means_and_their_way_back_to_tokens():
    values, mask = torch.tensor([1.0, 2, 6, 9, torch.nan, 7]), torch.tensor([1.0, 0, 1, 1, 0, 1])
    means = mean_per_sample(values, mask, [0, 3, 5, 5])  # the last sample is empty, the last token a pad
    assert means.tolist() == [3.5, 9, 0]
    assert spread_over_samples(means, [0, 3, 5, 5], 6).tolist() == [3.5, 3.5, 3.5, 9, 9, 0]


def test_the_index_of_samples():
    assert sample_index([0, 2, 2, 3]).tolist() == [0, 0, 2]
    assert sample_index([0]).tolist() == []
    assert sample_index([0]).dtype == torch.int64
