"""The plan of an optimizer step: every sample once, the cap held, ranks in step and about equally loaded."""

import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import ConfigError
from miles.training.packing import plan_micro_batches
from miles.training.schedule import optimizer_steps, rank_micro_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=40)
RANKS = st.integers(1, 5)
CAP = st.integers(1, 120)
MICRO = st.integers(1, 8)

# ---------------------------------------------------------------------------------------------------- optimizer steps


def test_steps_take_rollouts_in_order_and_keep_siblings_together():
    assert optimizer_steps([5, 5, 6, 7, 8], steps=2) == [[0, 1, 2], [3, 4]]


def test_lost_samples_make_steps_smaller_not_fewer():
    assert [len(rows) for rows in optimizer_steps(list(range(7)), steps=4)] == [2, 2, 2, 1]
    assert optimizer_steps([1, 2], steps=4) == [[0], [1]]


def test_epochs_repeat_the_steps():
    assert optimizer_steps([1, 2], steps=2, epochs=2) == [[0], [1], [0], [1]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_every_row_is_in_one_step_and_siblings_in_the_same(rollout_ids, steps):
    parts = optimizer_steps(rollout_ids, steps)
    assert sorted(row for rows in parts for row in rows) == list(range(len(rollout_ids)))
    rollouts = [{rollout_ids[row] for row in rows} for rows in parts]
    assert sum(map(len, rollouts)) == len(set(rollout_ids))
    sizes = [len(those) for those in rollouts]
    assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def plans(draw):
    """(lengths, arguments of `rank_micro_batches`)"""
    lengths = draw(LENGTHS)
    costs = draw(st.sampled_from([None, lengths, [length * (50 + length) for length in lengths]]))
    shared = draw(st.sampled_from([(), [length // 2 for length in lengths]]))
    return lengths, {
        "data_size": draw(RANKS), "max_tokens": draw(st.none() | CAP), "micro_batch_size": draw(MICRO),
        "shared": shared, "costs": costs,
    }  # fmt: skip


@given(plans())
def test_every_row_once_under_the_cap_and_ranks_in_step(drawn):
    lengths, arguments = drawn
    plan = rank_micro_batches(lengths, **arguments)
    assert len(plan) == arguments["data_size"]
    assert len({len(bins) for bins in plan}) == 1
    bins = [rows for rank in plan for rows in rank]
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in bins)
    cap, most = arguments["max_tokens"], arguments["micro_batch_size"]
    for rows in bins:
        assert len(rows) <= (most if cap is None else 1) or (cap and sum(lengths[row] for row in rows) <= cap)
    assert rank_micro_batches(list(lengths), **arguments) == plan


@given(plans())
def test_no_more_micro_batches_than_the_ranks_ask_for(drawn):
    lengths, arguments = drawn
    one, several = (rank_micro_batches(lengths, **{**arguments, "data_size": size}) for size in (1, 3))
    fewest, count = len(one[0]), sum(map(len, several))
    assert count == -(-fewest // 3) * 3
    assert [] not in one[0]


def meeting(lengths, costs, plan):
    """What meets in micro-batches, and the micro-batches that meet in ranks, whatever the rows are called."""
    return Counter(tuple(sorted((lengths[r], costs[r]) for r in rows)) for rank in plan for rows in rank), sorted(
        sum(costs[r] for rows in rank for r in rows) for rank in plan
    )


@given(LENGTHS.filter(len), RANKS, CAP, st.randoms(use_true_random=False))
def test_the_order_of_rows_is_no_matter(lengths, ranks, cap, random):
    costs = [length * (50 + length) for length in lengths]
    order = list(range(len(lengths)))
    random.shuffle(order)
    shuffled, their_costs = [lengths[i] for i in order], [costs[i] for i in order]
    one = rank_micro_batches(lengths, ranks, cap, 1, costs=costs)
    other = rank_micro_batches(shuffled, ranks, cap, 1, costs=their_costs)
    assert meeting(lengths, costs, one) == meeting(shuffled, their_costs, other)


@given(plans(), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_plan_for_twelve_shares_is_the_same_on_any_number_of_ranks(drawn, ranks):
    lengths, arguments = drawn
    arguments["data_size"] = 12
    shares = rank_micro_batches(lengths, **arguments)
    plan = rank_micro_batches(lengths, **{**arguments, "data_size": ranks, "planned_for": 12})
    each = 12 // ranks
    assert plan == [list(chain(*shares[rank * each : (rank + 1) * each])) for rank in range(ranks)]


def test_shares_that_the_ranks_cannot_divide():
    with pytest.raises(ConfigError, match=r"reproducible_ranks=4 cannot be divided among 3 data ranks"):
        rank_micro_batches([1, 2], 3, 10, 1, planned_for=4)


# ------------------------------------------------------------------------------------------------------------- balance


def loads(costs, plan):
    return [sum(costs[row] for rows in rank for row in rows) for rank in plan]


def test_largest_differencing_by_hand():
    # one sample a micro-batch: deals (9, 8), (7, 6), (2, 1), each of difference 1; 9 + 6 | 8 + 7, then 15 + 1 | 15 + 2
    plan = rank_micro_batches([9, 8, 7, 6, 2, 1], 2, None, 1, costs=[9, 8, 7, 6, 2, 1])
    assert sorted(loads([9, 8, 7, 6, 2, 1], plan)) == [16, 17]
    assert all(len(rank) == 3 for rank in plan)
    assert rank_micro_batches([9, 8, 7, 6], 2, None, 1) == [[[0], [2]], [[1], [3]]]  # in turn: 16 and 14


def test_a_rank_does_the_costliest_first():
    plan = rank_micro_batches([3, 9, 5, 7], 2, None, 1, costs=[3, 9, 5, 7])
    assert [[rows[0] for rows in rank] for rank in plan] == [[1, 0], [3, 2]]


def test_micro_batches_are_made_equal_where_the_cap_has_room():
    # by first fit 9 + 1, 5 + 4 and 3 would be three, and a fourth by halving
    plan = rank_micro_batches([9, 5, 4, 3, 1], 4, 10, 1, costs=[9, 5, 4, 3, 1])
    assert sorted(loads([9, 5, 4, 3, 1], plan)) == [4, 4, 5, 9]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), RANKS)
def test_ranks_differ_by_no_more_than_the_samples_of_one_deal(costs, ranks):
    """Joining the most loaded share of one deal with the least loaded of another makes no difference larger."""
    found = loads(costs, rank_micro_batches(costs, ranks, None, 1, costs=costs))
    ordered = sorted(costs + [0] * (-len(costs) % ranks), reverse=True)
    deals = [ordered[first : first + ranks] for first in range(0, len(ordered), ranks)]
    assert max(found) - min(found) <= max(max(deal) - min(deal) for deal in deals)


@pytest.mark.parametrize("quadratic", [False, True])
def test_many_samples_are_packed_tightly_balanced_and_soon(quadratic):
    cap, ranks = 8192, 64
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.5, 1.0, 100_000).astype(int) + 1, cap).tolist()
    costs = [length * (cap + length) for length in lengths] if quadratic else lengths
    seconds = []
    for _ in range(3):  # others may slow down one of them
        started = time.process_time()
        plan = rank_micro_batches(lengths, ranks, cap, 1, costs=costs)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1  # a third of a second where it was written
    count = sum(map(len, plan))
    assert sum(lengths) / cap <= count <= 1.005 * sum(lengths) / cap + ranks
    assert max(loads(costs, plan)) <= 1.005 * np.mean(loads(costs, plan))


# ------------------------------------------------------------------------------------------------- against the simplest


@given(st.lists(st.integers(1, 40), max_size=60), CAP)
def test_first_fit_is_that_of_the_definition(lengths, cap):
    bins = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        home = next((b for b in bins if sum(lengths[r] for r in b) + lengths[row] <= cap), None)
        if home is None:
            bins.append(home := [])
        home.append(row)
    assert plan_micro_batches(lengths, cap) == [sorted(rows) for rows in bins]
