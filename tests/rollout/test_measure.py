import math
from itertools import count

import numpy as np
import pytest

from miles.rollout.measure import batch_metrics, pass_at_k
from miles.types import Group, Prompt, Sample, Status, routed_experts_column


def test_pass_at_k_by_hand():
    # 4 samples, 1 right: any 2 of them hold it in 3 of 6 cases. 4 of 4 right: always.
    assert pass_at_k([[True, False, False, False]], 2) == pytest.approx(0.5)
    assert pass_at_k([[True, False, False, False], [True] * 4], 2) == pytest.approx(0.75)
    assert pass_at_k([[False] * 4], 4) == 0
    assert pass_at_k([[True, False]], 1) == 0.5


def test_prompts_with_too_few_samples_do_not_count():
    assert pass_at_k([[True, True], [False]], 2) == 1
    assert math.isnan(pass_at_k([[True]], 2))


IDS = count()


def sample(reward, length, status=Status.COMPLETED, **parts):
    one = Sample.begin(Prompt(id="s:0", task_set="s", text="x", tokens=[1]), id=next(IDS), group_id=0)
    one.append([2] * length)
    one.reward, one.status, one.reward_parts = reward, status, parts
    return one


def test_a_batch():
    groups = [
        Group(0, None, [sample(1.0, 2, a=1.0), sample(0.0, 4, Status.TRUNCATED, a=0.0)]),
        Group(1, None, [sample(2.0, 6), sample(2.0, 8)]),
    ]
    metrics = batch_metrics(groups)
    assert metrics["rollout/reward"] == pytest.approx(5 / 4)
    assert metrics["rollout/accuracy"] == pytest.approx(3 / 4)
    assert metrics["rollout/response_len/mean"] == 5
    assert (metrics["rollout/response_len/min"], metrics["rollout/response_len/max"]) == (2, 8)
    assert metrics["rollout/truncated_ratio"] == 0.25
    assert metrics["rollout/groups_agreeing"] == 0.5
    assert metrics["rollout/reward_parts/a"] == 0.5


def test_samples_cut_from_one_trajectory_are_judged_once():
    """Three siblings that are right and one answer that is wrong: half of the answers are right."""
    right = [sample(1.0, 2, a=1.0) for _ in range(3)]
    for sibling in right:
        sibling.rollout_id = right[0].id
    metrics = batch_metrics([Group(0, None, [*right, sample(0.0, 2, a=0.0)])])
    assert [metrics[f"rollout/{name}"] for name in ("reward", "accuracy", "reward_parts/a")] == [0.5, 0.5, 0.5]


def test_expert_choices_that_are_missing_are_counted():
    """Of samples that may be trained; one that has none at all misses a row for each position but the last."""
    whole, lost, none, failed = (sample(1.0, length) for length in (3, 4, 5, 6))
    assert "rollout/routed_experts_missing" not in batch_metrics([Group(0, None, [none])])
    column = routed_experts_column(2, 1, 8)
    whole.write(column, 0, np.ones((3, 2, 1)))
    lost.write(column, 2, np.ones((2, 2, 1)))
    failed.status = Status.FAILED
    metrics = batch_metrics([Group(0, None, [whole, lost, none, failed])])
    assert metrics["rollout/routed_experts_missing"] == 0 + 2 + 5


def test_a_success_is_one_by_the_tasks_own_reward():
    right, wrong = sample(0.6, 2), sample(1.0, 2)
    right.reward_before_terms, wrong.reward_before_terms = 1.0, 0.5
    metrics = batch_metrics([Group(0, None, [right, wrong])])
    assert metrics["rollout/reward"] == pytest.approx(0.8)
    assert metrics["rollout/accuracy"] == 0.5


def test_without_rewards_nothing_is_said_of_them():
    metrics = batch_metrics([Group(0, None, [sample(None, 3)])])
    assert "rollout/reward" not in metrics
    assert "rollout/groups_agreeing" not in metrics
