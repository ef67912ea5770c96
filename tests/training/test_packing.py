"""Plans, packing, halving and taking apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import DataError
from miles.training.packing import (
    build_micro_batch,
    chunk_micro_batches,
    plan_micro_batches,
    split_by_sample,
    split_micro_batch,
)
from miles.types import TEACHER_LOG_PROBS, Column, routed_experts_column

# ------------------------------------------------------------------------------------------------------------- plans


def test_first_fit_decreasing_by_hand():
    # in order of length: 7 (index 1), 6 (3), 4 (0), 3 (2), 2 (4); room of 10
    assert plan_micro_batches([4, 7, 3, 6, 2], 10) == [[1, 2], [0, 3], [4]]


def test_samples_of_a_prompt_stay_together_where_that_pays():
    lengths, shared = [7, 6, 7, 6], [0, 5, 0, 5]  # two prompts of 5; by length, 0 would go with 2 and 1 with 3
    assert plan_micro_batches(lengths, 14) == [[0, 2], [1, 3]]
    assert plan_micro_batches(lengths, 14, shared) == [[0, 1], [2, 3]]  # 10 of 26 tokens are spared
    assert plan_micro_batches(lengths, 14, [0, 1, 0, 1]) == [[0, 2], [1, 3]]  # 2 of 26
    assert plan_micro_batches([8, 8, 8, 1], 10, [0, 5, 5, 0]) == [[0], [1], [2, 3]]
    assert plan_micro_batches([], 10, []) == []


def test_a_sample_over_the_cap_is_alone():
    assert plan_micro_batches([3, 50, 4], 10) == [[1], [0, 2]]


def test_no_samples_no_micro_batches():
    assert plan_micro_batches([], 10) == []
    assert chunk_micro_batches(0, 4) == []


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_every_sample_once_under_the_cap_and_never_two_half_empty(lengths, cap):
    plans = plan_micro_batches(lengths, cap)
    assert sorted(index for plan in plans for index in plan) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in plan) for plan in plans]
    assert all(load <= cap or len(plan) == 1 for load, plan in zip(loads, plans, strict=True))
    assert sum(load <= cap // 2 for load in loads) <= 1
    assert plan_micro_batches(lengths, cap) == plans


def test_chunks_count_samples():
    assert chunk_micro_batches(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]


# ------------------------------------------------------------------------------------------------------- every column

TOKENS = [np.array([5, 6, 7]), np.array([8]), np.array([9, 10, 11, 12]), np.array([13, 14])]
ROUTING = routed_experts_column(layers=2, top_k=3, experts=8)
WIDE_ROUTING = routed_experts_column(layers=2, top_k=3, experts=256)
SPECS = {
    "mask": Column("mask", "float32", 0.0),
    "version": Column("version", "int32", -1),
    "wide": Column("wide", "float32", 0.0, width=(4,)),
    "teacher_log_probs": TEACHER_LOG_PROBS,
    "bytes": Column("bytes", "uint8", 255, offset=-1, width=(2,)),
    "rollout_routed_experts": ROUTING,
    "routing_of_many": WIDE_ROUTING,
}


def rows_of(spec: Column) -> list[np.ndarray]:
    """Values that tell sample, row and place apart."""
    return [
        (np.arange(spec.rows(len(t)) * int(np.prod(spec.width))).reshape(-1, *spec.width) + 20 * i + 1).astype(
            spec.dtype
        )
        for i, t in enumerate(TOKENS)
    ]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0], [3, 1, 0]])
def test_every_column_survives_packing_and_halving(name, order):
    spec, values = SPECS[name], rows_of(SPECS[name])
    batch = build_micro_batch(order, TOKENS, {name: values}, specs=SPECS)
    assert batch.columns[name].shape == (batch.bounds[-1], *spec.width)
    assert batch.columns[name].numpy().dtype == spec.dtype
    for part in (batch, *split_micro_batch(batch)):
        pieces = split_by_sample(part.columns[name], part.bounds)
        for row, piece in zip(part.sample_ids, pieces, strict=True):
            expected = values[row]
            if spec.offset:
                expected = np.concatenate([expected, np.full((1, *spec.width), spec.fill, spec.dtype)])
            np.testing.assert_array_equal(piece.numpy(), expected)


def test_tokens_positions_and_bounds():
    batch = build_micro_batch([2, 0], TOKENS, {})
    assert batch.tokens_T.tolist() == [9, 10, 11, 12, 5, 6, 7]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.bounds == [0, 4, 7]
    assert batch.sample_ids == [2, 0]


def test_a_sample_without_the_column_gets_its_fill():
    values = [np.ones(3, np.float32), None, None, np.ones(2, np.float32)]
    batch = build_micro_batch([1, 0], TOKENS, {"teacher_log_probs": values}, specs=SPECS)
    assert batch.columns["teacher_log_probs"].tolist() == [0, 1, 1, 1]
    with pytest.raises(DataError, match="specs"):
        build_micro_batch([1, 0], TOKENS, {"teacher_log_probs": values})


def test_routing_without_a_declaration_ends_in_minus_one():
    batch = build_micro_batch([3], TOKENS, {"rollout_routed_experts": rows_of(WIDE_ROUTING)})
    assert (batch.columns["rollout_routed_experts"][-1] == -1).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([1, 2, 3, 4, 5], "of sample 0 of the batch has 5 rows, and the sample 3 tokens"), ([1.0, 2.0], "one row short")],
)
def test_rows_that_do_not_match_the_tokens_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        build_micro_batch([0], TOKENS, {"x": [np.array(rows)]})


def test_a_sample_without_tokens_is_refused():
    with pytest.raises(DataError, match="sample 1 "):
        build_micro_batch([0, 1], [[1], []], {})


def test_an_empty_micro_batch_has_empty_columns():
    batch = build_micro_batch([], TOKENS, {"mask": [], "wide": []}, specs=SPECS)
    assert len(batch) == 0
    assert batch.columns["wide"].shape == (0, 4)


def test_scalars_and_multimodal_follow_their_samples():
    batch = build_micro_batch(
        [2, 0, 3], TOKENS, {}, scalars={"reward": torch.arange(4.0)}, multimodal=[{"n": i} for i in range(4)]
    )
    assert batch.scalars["reward"].tolist() == [2, 0, 3]
    first, second = split_micro_batch(batch)
    assert (first.scalars["reward"].tolist(), first.multimodal) == ([2], [{"n": 2}])
    assert (second.scalars["reward"].tolist(), second.multimodal) == ([0, 3], [{"n": 0}, {"n": 3}])


# ----------------------------------------------------------------------------------------------------------- halving


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12))
def test_halves_hold_all_samples_and_neither_is_much_larger(lengths):
    tokens = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    batch = build_micro_batch(list(range(len(lengths))), tokens, {})
    first, second = split_micro_batch(batch)
    assert torch.equal(torch.cat([first.tokens_T, second.tokens_T]), batch.tokens_T)
    assert first.sample_ids + second.sample_ids == batch.sample_ids
    assert abs(first.bounds[-1] - second.bounds[-1]) <= max(lengths)
    assert first.positions_T[0] == second.positions_T[0] == 0


def test_one_sample_cannot_be_halved():
    with pytest.raises(ValueError, match="cannot be split"):
        split_micro_batch(build_micro_batch([0], TOKENS, {}))


def test_a_trailing_pad_belongs_to_nobody():
    pieces = split_by_sample(torch.arange(8), [0, 4, 7])
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6]]
