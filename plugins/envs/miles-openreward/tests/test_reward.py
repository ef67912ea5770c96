"""Rewards worked out by hand."""

import asyncio

import pytest
from miles_openreward.plugin import OpenRewardRewardOptions
from miles_openreward.reward import OpenRewardReward

from miles.api import Prompt, Sample, Status, Turn


def score(paid, status=Status.COMPLETED, **options):
    sample = Sample.begin(Prompt("set:0", "set", text="?", tokens=[1]), id=0, group_id=0)
    sample.turns = [Turn(i, i + 1, "stop", reward=reward) for i, reward in enumerate(paid)]
    sample.status = status
    return asyncio.run(OpenRewardReward(OpenRewardRewardOptions(**options)).score(sample))


@pytest.mark.parametrize(
    ("reduction", "expected", "unfinished"),
    [("sum", 3.5, 1.5), ("mean", 1.75, 0.5), ("max", 3.0, 3.0), ("min", 0.5, -2)],
)
def test_turns_that_were_paid_are_reduced_and_an_end_that_was_not_reached_joins_them(reduction, expected, unfinished):
    paid = [0.5, None, 3.0]
    assert score(paid, reward_reduction=reduction) == expected
    assert score(paid, reward_reduction=reduction, nonterminal_reward=-2.0) == expected
    cut = score(paid, Status.TRUNCATED, reward_reduction=reduction, nonterminal_reward=-2.0)
    assert cut == pytest.approx(unfinished)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 2.0), ("mean", 0.5), ("max", 1.0), ("min", 0.25)])
def test_calls_of_one_turn_are_reduced_one_by_one(reduction, expected):
    """A policy that calls often in a turn gains nothing by it where the best call counts."""
    sample = Sample.begin(Prompt("set:0", "set", text="?", tokens=[1]), id=0, group_id=0)
    sample.turns = [Turn(0, 1, "stop", reward=1.0), Turn(1, 2, "stop", reward=1.0)]
    sample.metadata["environment"] = {"paid": [0.25, 0.5, 0.25, 1.0]}
    sample.status = Status.COMPLETED
    reward = OpenRewardReward(OpenRewardRewardOptions(reward_reduction=reduction))
    assert asyncio.run(reward.score(sample)) == expected


def test_nothing_paid_is_worth_nothing():
    assert score([]) == score([None], reward_reduction="min") == 0.0
    assert score([], Status.TRUNCATED, nonterminal_reward=-1.0, reward_reduction="max") == -1.0


def test_bounds_come_last():
    assert score([3.0, 4.0], max_reward=1.0) == 1.0
    assert score([-3.0], min_reward=-1.0, max_reward=1.0) == -1.0
    assert score([], Status.TRUNCATED, nonterminal_reward=-5.0, min_reward=-1.0) == -1.0
