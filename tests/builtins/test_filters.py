"""Which groups are worth training on."""

import pytest

from miles.api import Group, Prompt, Sample
from miles.builtins.filters import agreeing_rewards


def group_of(*rewards):
    prompt = Prompt("a:0", "a", text="?", tokens=[1])
    samples = [Sample.begin(prompt, id=i, group_id=0) for i in range(len(rewards))]
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = reward
    return Group(0, prompt, samples)


@pytest.mark.parametrize(
    ("rewards", "keep", "reason"),
    [
        ((1.0, 0.0), True, ""),
        ((0.5, 0.5, 0.5001), True, ""),
        ((1.0, 1.0), False, "agree_1"),
        ((0.0, 0.0), False, "agree_0"),
        ((0.25, 0.25), False, "agree_0.25"),
        ((1.0,), False, "agree_1"),
        ((None, 1.0, 1.0), False, "agree_1"),
        ((None, None), False, "no_rewards"),
    ],
)
def test_agreeing_rewards(rewards, keep, reason):
    verdict = agreeing_rewards(group_of(*rewards))
    assert (verdict.keep, verdict.reason) == (keep, reason)


def test_what_was_added_to_the_rewards_of_a_task_is_not_looked_at():
    group = group_of(1.0, 0.7)
    for sample in group.samples:
        sample.reward_before_terms = 1.0
    assert agreeing_rewards(group).reason == "agree_1"
    group = group_of(0.5, 0.5)
    group.samples[0].reward_before_terms = 1.0
    assert agreeing_rewards(group).keep
