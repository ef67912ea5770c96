"""Per-token columns from samples to micro-batches: nothing is lost, shifted or shared."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles.config import Config
from miles.errors import DataError
from miles.training.packing import build_micro_batch, split_micro_batch
from miles.training.table import Table
from miles.training.worker import TrainWorker
from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    TEACHER_LOG_PROBS,
    WEIGHT_VERSION,
    Column,
    Group,
    Prompt,
    Sample,
    Status,
    routed_experts_column,
)

COLUMNS = [
    ROLLOUT_LOG_PROBS,
    TEACHER_LOG_PROBS,
    routed_experts_column(layers=2, top_k=3, experts=8),
    Column("mine", "float32", fill=0.5),
    Column("mine", "float32", fill=7.0, offset=-1),
    Column("mine", "float64", fill=-2.0, offset=-1, width=(3,)),
    Column("mine", "int64", fill=4, width=(2, 2)),
]
PROMPT, SAID = 2, (3, 1, 4)


def sample_of(number, said, column=None):
    """Two prompt tokens and `said` of the model's; row `t` of the column is `100 * number + t + 1`."""
    sample = Sample.begin(Prompt("set:0", "set", tokens=[1, 2]), id=number, group_id=0)
    sample.append(list(range(said)), {LOSS_MASK: 1, WEIGHT_VERSION: 3})
    sample.status, sample.reward = Status.COMPLETED, 1.0
    if column is not None:
        sample.write(column, 0, expected_rows(number, column, PROMPT + said)[: column.rows(PROMPT + said)])
    return sample


def expected_rows(number, column, tokens):
    rows = 100 * number + 1 + np.arange(tokens).reshape(-1, *[1] * len(column.width))
    rows = np.broadcast_to(rows, (tokens, *column.width)).astype(column.dtype)
    rows[column.rows(tokens) :] = column.fill
    return rows


def table_of(*samples):
    return Table.from_groups([Group(0, samples[0].prompt, list(samples))])


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column.name}{column.offset}{column.width}")
def test_columns_travel_from_samples_to_micro_batches(column):
    """The middle sample never declared the column: it has the fill, and is known not to have had it."""
    samples = [sample_of(0, SAID[0], column), sample_of(1, SAID[1]), sample_of(2, SAID[2], column)]
    table = table_of(*samples)
    assert table.present[column.name].tolist() == [True, False, True]
    expected = [expected_rows(i, column, PROMPT + said) for i, said in enumerate(SAID)]
    expected[1] = np.full_like(expected[1], column.fill)

    cut = table.take([2, 0, 1])
    assert cut.present[column.name].tolist() == [True, True, False]
    whole = build_micro_batch([0, 1, 2], cut.tokens, cut.columns)
    order = np.concatenate([expected[i] for i in (2, 0, 1)])
    for batch, rows in zip((whole, *split_micro_batch(whole)), (order, order[:6], order[6:]), strict=True):
        assert batch.columns[column.name].dtype == getattr(torch, column.dtype)
        assert np.array_equal(batch.columns[column.name].numpy(), rows)


def test_a_worker_packs_what_the_table_has():
    worker = TrainWorker.__new__(TrainWorker)
    worker.setup = SimpleNamespace(device="cpu", config=Config())
    batch = worker._pack(table_of(sample_of(0, 3, COLUMNS[5])))
    assert batch.columns["mine"].shape == (5, 3)
    assert (batch.columns["mine"][-1] == -2).all()


def test_an_empty_micro_batch_has_columns_of_the_same_kind():
    """A rank without samples packs none, and must not take expert choices for float32."""
    worker, column = TrainWorker.__new__(TrainWorker), COLUMNS[2]
    worker.setup = SimpleNamespace(device="cpu", config=Config())
    batch = worker._pack(table_of(sample_of(0, 3, column)).take([]))
    assert (batch.columns[column.name].dtype, batch.columns[column.name].shape) == (torch.uint8, (0, 2, 3))


def test_a_column_can_be_left_out():
    table = table_of(sample_of(0, 3, COLUMNS[2]))
    assert set(table.without(COLUMNS[2].name).columns) == {"mask"}
    assert set(table.columns) == {"mask", COLUMNS[2].name}


def test_the_mask_is_the_loss_mask_and_versions_stay():
    table = table_of(sample_of(0, 3))
    assert [mask.tolist() for mask in table.columns["mask"]] == [[0, 0, 1, 1, 1]]
    assert set(table.columns) == {"mask"}
    assert table.present["rollout_log_probs"].tolist() == [False]


def test_what_samples_declare_must_agree():
    wide, narrow = Column("mine", "float32", 0.0, width=(2,)), Column("mine", "float32", 0.0)
    with pytest.raises(DataError, match="'mine' is declared as .* in sample 8"):
        table_of(sample_of(7, 2, wide), sample_of(8, 2, narrow))


def test_fills_must_agree():
    """Else 255 would be an expert in one sample and nothing in the next."""
    few, many = routed_experts_column(2, 3, 255), routed_experts_column(2, 3, 256)
    with pytest.raises(DataError, match="'rollout_routed_experts' is declared as .* in sample 8"):
        table_of(sample_of(7, 2, few), sample_of(8, 2, many))


def test_a_column_that_lost_rows_is_named_with_its_sample():
    sample = sample_of(8, 2, TEACHER_LOG_PROBS)
    sample.columns["teacher_log_probs"] = sample.columns["teacher_log_probs"][:1]
    with pytest.raises(DataError, match="'teacher_log_probs' of sample 8 has 1 rows, and the sample 4 tokens"):
        table_of(sample_of(7, 2, TEACHER_LOG_PROBS), sample)


@pytest.mark.parametrize("name", ["mask", "advantages", "old_log_probs"])
def test_columns_of_the_trainer_are_its_own(name):
    with pytest.raises(DataError, match=f"'{name}' of sample 5 has a name that the trainer uses"):
        table_of(sample_of(5, 2, Column(name, "float32", 0.0)))
