from hypothesis import given
from hypothesis import strategies as st

from miles.training.schedule import optimizer_steps, rank_micro_batches


def test_steps_take_rollouts_in_order_and_keep_siblings_together():
    assert optimizer_steps([5, 5, 6, 7, 8], steps=2) == [[0, 1, 2], [3, 4]]


def test_lost_samples_make_steps_smaller_not_fewer():
    assert [len(rows) for rows in optimizer_steps(list(range(7)), steps=4)] == [2, 2, 2, 1]
    assert optimizer_steps([1, 2], steps=4) == [[0], [1]]


def test_epochs_repeat_the_steps():
    assert optimizer_steps([1, 2], steps=2, epochs=2) == [[0], [1], [0], [1]]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 120)),
    st.integers(1, 8),
)
def test_every_row_once_and_ranks_in_step(lengths, data_size, cap, micro):
    plan = rank_micro_batches(lengths, data_size, cap, micro)
    assert len(plan) == data_size
    assert len({len(batches) for batches in plan}) == 1
    assert sorted(row for batches in plan for batch in batches for row in batch) == list(range(len(lengths)))
    if cap is not None:
        assert all(sum(lengths[r] for r in b) <= cap or len(b) == 1 for batches in plan for b in batches)
