"""Samples grow as one: tokens and columns always agree."""

import numpy as np
import pytest

from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    WEIGHT_VERSION,
    Column,
    Prompt,
    Sample,
    Turn,
    routed_experts_column,
)


def begin(tokens=(1, 2, 3)):
    return Sample.begin(Prompt(id="s:0", task_set="s", text="x", tokens=list(tokens)), id=7, group_id=2)


def test_a_sample_grows_by_turns():
    sample = begin()
    sample.append([4, 5], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-1.0, -2.0], WEIGHT_VERSION: 3})
    sample.append([6])
    sample.append([7], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-3.0]})
    assert sample.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert sample.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert sample.columns["rollout_log_probs"].tolist() == [0, 0, 0, -1, -2, 0, -3]
    assert sample.columns["weight_version"].tolist() == [-1, -1, -1, 3, 3, -1, -1]
    assert (sample.response_length, sample.trainable_tokens, sample.rollout_id) == (4, 3, 7)


def test_the_prompt_itself_is_not_changed():
    prompt = Prompt(id="s:0", task_set="s", text="x", tokens=[1, 2])
    Sample.begin(prompt, id=0, group_id=0).append([3])
    assert prompt.tokens == [1, 2]


def test_routing_has_a_row_for_each_forward_position():
    routing = routed_experts_column(layers=2, top_k=1, experts=8)
    sample = begin()
    sample.append([4, 5], {routing: np.full((2, 2, 1), 6)})  # rows of the passes at positions 2 and 3
    assert sample.columns["rollout_routed_experts"].shape == (4, 2, 1)
    assert sample.columns["rollout_routed_experts"][:, 0, 0].tolist() == [255, 255, 6, 6]
    sample.write(routing, 0, np.zeros((2, 2, 1)))  # the prompt's rows come late
    assert sample.columns["rollout_routed_experts"][:, 0, 0].tolist() == [0, 0, 6, 6]


def test_routing_of_a_sample_of_one_token_has_no_row():
    sample = begin(tokens=[1])
    sample.declare(routed_experts_column(2, 1, 8))
    assert len(sample.columns["rollout_routed_experts"]) == 0


@pytest.mark.parametrize("rows", [[-1.0], [-1.0, -2.0, -3.0], [[-1.0], [-2.0]]])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="rollout_log_probs.*do not fit"):
        begin().append([4, 5], {ROLLOUT_LOG_PROBS: rows})


def test_a_column_declared_in_two_ways_is_refused():
    sample = begin()
    sample.declare(Column("mine", "float32", fill=0.0))
    with pytest.raises(ValueError, match="declared as"):
        sample.declare(Column("mine", "int32", fill=0))


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="not been rendered"):
        Sample.begin(Prompt(id="s:0", task_set="s", text="x"), id=0, group_id=0)


def test_a_beginning_is_a_copy_with_everything_up_to_a_token():
    routing = routed_experts_column(layers=1, top_k=1, experts=8)
    sample = begin((1, 2, 3))
    sample.append([4, 5], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-0.5, -1.0]})
    sample.write(routing, 0, np.arange(4).reshape(4, 1, 1))
    sample.turns.append(Turn(3, 5, "stop"))
    sample.append([6])
    sample.append([7], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-2.0]})
    sample.turns.append(Turn(6, 7, "stop"))
    copy = sample.beginning(5)
    assert (copy.tokens, copy.turns) == ([1, 2, 3, 4, 5], [Turn(3, 5, "stop")])
    assert copy.columns["rollout_log_probs"].tolist() == [0, 0, 0, -0.5, -1.0]
    assert copy.columns[routing.name][:, 0, 0].tolist() == [0, 1, 2, 3]
    copy.loss_mask[:] = 0
    copy.append([8], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-3.0]})
    copy.turns[0].reward = 1.0
    assert (copy.loss_mask.tolist(), sample.loss_mask.tolist()) == ([0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 1])
    assert (sample.tokens, sample.turns[0].reward) == ([1, 2, 3, 4, 5, 6, 7], None)


@pytest.mark.parametrize("length", [2, 8])
def test_a_beginning_holds_the_prompt_and_no_more_than_there_is(length):
    with pytest.raises(ValueError, match="no beginning"):
        begin((1, 2, 3)).beginning(length)
