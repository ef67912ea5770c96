"""M2PO: by hand, and against the definition on random numbers."""

from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_is_corrections.m2po import cut, m2po
from miles_is_corrections.plugin import M2poOptions


def test_the_fewest_tokens_of_largest_square_are_dropped(corrected):
    # squares 0.01, 0.04, 0.09, 1; means of the smallest 1, 2, 3, 4 of them: 0.01, 0.025, 0.0467, 0.285
    samples = [[0.1, -1.0], [None, 0.3, -0.2]]
    found = corrected(m2po, M2poOptions(threshold=0.04), samples)
    assert found.keep == [[1, 0], [1, 0, 1]]
    assert found.w is None
    assert found.metrics["is/second_moment"] == pytest.approx(0.285)
    assert found.metrics["is/second_moment_kept"] == pytest.approx(0.025)
    assert (found.metrics["is/fraction_low"], found.metrics["is/fraction_high"]) == (0.25, 0.25)
    assert found.metrics["is/fraction_rejected"] == found.metrics["is/effective_sample_size"] == 0.5
    assert corrected(m2po, M2poOptions(threshold=0.05), samples).keep == [[1, 0], [1, 1, 1]]
    assert corrected(m2po, M2poOptions(threshold=0.3), samples).keep == [[1, 1], [1, 1, 1]]


def test_one_token_is_kept_where_all_are_above(corrected):
    assert corrected(m2po, M2poOptions(), [[50.0, -3.0], [2.0, -50.0]]).keep == [[0, 0], [1, 0]]


def test_tokens_that_tie_at_the_cut_go_together_in_any_order(corrected):
    # squares 0, 1/16, 1/16: the mean of all is 1/24, of two 1/32; to drop one would be enough, but which?
    assert corrected(m2po, M2poOptions(threshold=0.04), [[0.25], [-0.25, 0.0]]).keep == [[0], [0, 1]]
    assert corrected(m2po, M2poOptions(threshold=0.04), [[-0.25, 0.0], [0.25]]).keep == [[0, 1], [0]]
    assert corrected(m2po, M2poOptions(), [[0.5], [-0.5]]).keep == [[1], [1]]


def test_the_mean_must_be_below_the_threshold_not_at_it(corrected):
    assert corrected(m2po, M2poOptions(threshold=0.25), [[0.5, 0.5, 0.0]]).keep == [[1, 1, 1]]  # 1/6
    assert corrected(m2po, M2poOptions(threshold=0.125), [[0.0, 0.5]]).keep == [[1, 0]]  # 1/8 is not below 1/8


def test_nothing_to_drop_from(corrected):
    assert corrected(m2po, M2poOptions(), [[None]]).keep == [[1]]
    assert corrected(m2po, M2poOptions(), []).keep == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 2500, width=32), min_size=1, max_size=30), st.floats(0.01, 100))
def test_what_is_kept_is_what_the_definition_says(values, threshold):
    limit = cut(torch.tensor(values, dtype=torch.float64), threshold)
    ascending = sorted(values)
    kept = [value for value in ascending if value <= limit]
    assert kept
    assert fmean(kept) < threshold * (1 + 1e-9) or set(kept) == {ascending[0]}
    more = [value for value in ascending if value <= min(ascending[len(kept) :], default=limit)]
    if len(more) > len(kept):  # the next value, with all that tie with it, would be too much
        assert fmean(more) >= threshold * (1 - 1e-9)
