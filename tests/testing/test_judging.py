"""Rewards and filters that are wrong in one way each."""

import asyncio
import itertools
import random
import time

import pytest

from miles.api import Verdict
from miles.testing import RewardContract, SampleFilterContract

CASES = [("42", "42", 1.0), ("43", "42", 0.0)]


def right(sample):
    return float(sample.text == str(sample.prompt.label))


class Group:
    async def score_group(self, group):
        return [{"reward": right(sample), "length": len(sample.text)} for sample in group.samples]


class Shared:
    """Keeps what it judges on itself while it waits."""

    async def score(self, sample):
        self.sample = sample
        await asyncio.sleep(0.001)
        return right(self.sample)


class Stateful:
    def __init__(self):
        self.calls = itertools.count()

    def score(self, sample):
        return right(sample) + next(self.calls)


def editing(sample):
    sample.text = sample.text.strip()
    sample.reward = right(sample)
    return sample.reward


def appending(sample):
    sample.append([9])
    return right(sample)


def of(function):
    return lambda: function


def test_right_rewards_pass(passes):
    passes(RewardContract, of(right), cases=CASES)
    passes(RewardContract, Group, cases=CASES)


def test_wrong_rewards_are_caught(catches):
    catches(
        RewardContract,
        {
            "test_known_answers_get_their_reward": [of(lambda s: 1 - right(s)), of(lambda s: 0.0)],
            "test_a_score_is_finite_numbers": [
                of(lambda s: float("nan") if len(s.text) > 2 else 0.0),
                of(lambda s: {"score": 1.0}),
                of(lambda s: {"reward": 1.0, "why": "good"}),
                of(lambda s: None),
            ],
            "test_a_malformed_answer_is_a_score_not_an_exception": [
                of(lambda s: float(s.text.split("boxed{")[1].rstrip("}") == s.prompt.label)),
                of(lambda s: float(int(s.text) == 42)),
                (of(lambda s: time.sleep(0.05) or 0.0), {"seconds": 0.01}),
            ],
            "test_the_same_answer_gets_the_same_reward": [of(lambda s: random.random())],
            "test_many_at_once_as_one_by_one": [Shared, Stateful],
            "test_the_sample_is_left_alone": [of(editing), of(appending)],
        },
        cases=CASES,
    )


# ----------------------------------------------------------------------------------------------------------- filters

KNOWN = {"kept": [[1.0, 0.0]], "dropped": [[1.0, 1.0]]}


def spread(group):
    rewards = {sample.reward for sample in group.samples if sample.reward is not None}
    return Verdict(len(rewards) > 1, "" if len(rewards) > 1 else "agree")


def test_right_filters_pass(passes):
    passes(SampleFilterContract, of(spread), **KNOWN)


def test_wrong_filters_are_caught(catches):
    def trimming(group):
        group.samples.pop()
        return spread(group)

    def marking(group):
        for sample in group.samples:
            sample.reward = 0.0
        return spread(group)

    class Alternating:
        seen = itertools.count()

        def __call__(self, group):
            return Verdict(next(self.seen) % 2 == 0, "odd")

    catches(
        SampleFilterContract,
        {
            "test_known_groups_are_kept_or_dropped": [
                of(lambda g: Verdict(True)),
                of(lambda g: Verdict(False, "no")),
                of(lambda g: max(s.reward for s in g.samples) > 0),
            ],
            "test_a_drop_has_a_reason": [
                of(lambda g: Verdict(spread(g).keep)),
                of(lambda g: Verdict(spread(g).keep, "all agree")),
            ],
            "test_any_group_gets_a_verdict": [
                of(lambda g: Verdict(max(g.rewards_G) != min(g.rewards_G), "agree")),
                of(lambda g: Verdict(sum(s.reward for s in g.samples) > 0, "low")),
            ],
            "test_the_group_is_left_alone": [of(trimming), of(marking)],
            "test_the_same_group_gets_the_same_verdict": [Alternating],
        },
        **KNOWN,
    )


def test_what_has_no_examples_says_so():
    """A reward of which nobody said what is right must not look as if that had been checked."""
    for contract, name in (
        (RewardContract, "test_known_answers_get_their_reward"),
        (SampleFilterContract, "test_known_groups_are_kept_or_dropped"),
    ):
        with pytest.raises(pytest.skip.Exception, match="given"):
            getattr(contract(), name)()
