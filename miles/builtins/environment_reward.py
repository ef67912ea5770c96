"""Reward `environment`: what the environment paid during a trajectory, as one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from miles.api import Sample, Status
from miles.builtins.options import EnvironmentRewardOptions

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "mean": lambda rewards: math.fsum(rewards) / len(rewards),
    "max": max,
    "min": min,
    "last": lambda rewards: rewards[-1],
}


class EnvironmentReward:
    """Reduces the rewards of the turns, in this order: reduction, `nonterminal`, then the bounds.

    Turns without a reward do not take part; a trajectory without any is worth 0.
    """

    def __init__(self, options: EnvironmentRewardOptions):
        self.options = options

    async def score(self, sample: Sample) -> float:
        options = self.options
        if options.nonterminal is not None and sample.status is not Status.COMPLETED:
            reward = options.nonterminal
        else:
            rewards = [turn.reward for turn in sample.turns if turn.reward is not None]
            reward = REDUCTIONS[options.reduction](rewards) if rewards else 0.0
        if options.min is not None:
            reward = max(reward, options.min)
        return reward if options.max is None else min(reward, options.max)
