"""Reward `openreward`: what an environment paid, as one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from miles.api import Sample, Status
from miles_openreward.plugin import PAID, OpenRewardRewardOptions

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "mean": lambda paid: math.fsum(paid) / len(paid),
    "max": max,
    "min": min,
}


class OpenRewardReward:
    """As OpenReward's own recipes reckon: `nonterminal_reward` joins what was paid, then the reduction, then bounds.

    That is how it differs from the reward `environment`, where it takes the place of all that was paid. Calls of one
    turn count one by one: many of them together are no greater `max` than the best of them.
    """

    def __init__(self, options: OpenRewardRewardOptions):
        self.options = options

    async def score(self, sample: Sample) -> float:
        options = self.options
        of_turns = [turn.reward for turn in sample.turns if turn.reward is not None]
        paid = list(sample.metadata.get("environment", {}).get(PAID, of_turns))
        if options.nonterminal_reward is not None and sample.status is not Status.COMPLETED:
            paid.append(options.nonterminal_reward)
        reward = REDUCTIONS[options.reward_reduction](paid) if paid else 0.0
        if options.min_reward is not None:
            reward = max(reward, options.min_reward)
        return reward if options.max_reward is None else min(reward, options.max_reward)
