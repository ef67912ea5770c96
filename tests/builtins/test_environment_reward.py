"""From the rewards of turns to one number."""

import asyncio

import pytest

from miles.api import ConfigError, Prompt, Sample, Status, Turn
from miles.builtins.environment_reward import EnvironmentReward
from miles.builtins.options import EnvironmentRewardOptions

PAID = [0.5, None, 2.0, -1.0]


def score(rewards, status=Status.COMPLETED, **options):
    sample = Sample.begin(Prompt("a:0", "a", text="?", tokens=[1]), id=0, group_id=0)
    sample.turns = [Turn(1, 1, "stop", reward=reward) for reward in rewards]
    sample.status = status
    return asyncio.run(EnvironmentReward(EnvironmentRewardOptions(**options)).score(sample))


@pytest.mark.parametrize(
    ("reduction", "expected"), [("sum", 1.5), ("mean", 0.5), ("max", 2.0), ("min", -1.0), ("last", -1.0)]
)
def test_reductions_run_over_the_turns_that_were_paid(reduction, expected):
    assert score(PAID, reduction=reduction) == expected


def test_a_trajectory_that_was_never_paid_is_worth_nothing():
    assert score([None, None]) == score([], reduction="max") == 0.0


def test_the_nonterminal_reward_replaces_that_of_an_unfinished_trajectory():
    assert score(PAID, Status.TRUNCATED, nonterminal=-0.5) == -0.5
    assert score(PAID, Status.COMPLETED, nonterminal=-0.5) == 1.5
    assert score(PAID, Status.TRUNCATED) == 1.5


@pytest.mark.parametrize(
    ("bounds", "expected"), [({"max": 1.0}, 1.0), ({"min": 2.0}, 2.0), ({"min": 0, "max": 9}, 1.5)]
)
def test_bounds(bounds, expected):
    assert score(PAID, **bounds) == expected


def test_crossed_bounds_are_refused():
    with pytest.raises(ConfigError, match="min=1 is above max=0"):
        EnvironmentRewardOptions(min=1, max=0)
