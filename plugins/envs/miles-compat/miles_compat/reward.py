"""The reward `slime_function`: what a reward function of slime or Miles says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from miles.api import Group, RolloutError, Sample, Score
from miles_compat import upstream
from miles_compat.calling import called, load_function, there
from miles_compat.conversion import KEPT, theirs
from miles_compat.namespace import args
from miles_compat.plugin import RewardOptions
from miles_compat.score import parts


class SlimeReward:
    """Asks the function once for each sample; with a list for samples that a generate function returned as a list; with
    `group_rm` once for all samples of a prompt, with a list. A sample that its generate function has rewarded keeps
    that reward, and is not asked about."""

    def __init__(self, options: RewardOptions):
        self.options = options
        self._function = load_function(options.path) if options.path else None

    async def score_group(self, group: Group) -> Sequence[Score]:
        scores: dict[int, Any] = {}
        unjudged: dict[Any, list[int]] = {}
        for index, sample in enumerate(group.samples):
            kept = sample.metadata.get(KEPT, {})
            if "reward" in kept and "by" not in kept:
                scores[index] = _understood(kept["reward"], self.options.reward_key)
            else:
                unjudged.setdefault(self._batch(sample, index), []).append(index)
        asked = [self._ask(batch, [group.samples[i] for i in indices]) for batch, indices in unjudged.items()]
        for indices, answers in zip(unjudged.values(), await asyncio.gather(*asked), strict=True):
            scores |= dict(zip(indices, answers, strict=True))
        return [scores[index] for index in range(len(group.samples))]

    def _batch(self, sample: Sample, index: int) -> Any:
        """Samples of one batch are asked about together; None where one is asked about alone."""
        if self.options.group_rm:
            return "group"
        return ("siblings", sample.rollout_id) if sample.metadata.get(KEPT, {}).get("listed") else index

    async def _ask(self, batch: Any, samples: list[Sample]) -> list[Any]:
        """Scores, or what was raised instead of each: the core fails those samples with it."""
        try:
            if self._function is None:
                raise RolloutError(
                    "nobody rewarded the sample: the generate function set no `reward`, there is no --custom-rm-path"
                )
            alone = isinstance(batch, int)
            given = [theirs(sample) for sample in samples]
            rewards = await there(called(self._function, args(), given[0] if alone else given))
            rewards = [rewards] if alone else list(rewards)
            if len(rewards) != len(samples):
                raise RolloutError(f"{self.options.path} returned {len(rewards)} rewards for {len(samples)} samples")
        except Exception as error:
            return [error] * len(samples)
        for sample, made, reward in zip(samples, given, rewards, strict=True):
            _keep(sample, made, reward)
        return [_understood(reward, self.options.reward_key) for reward in rewards]


def _keep(sample: Sample, made: upstream.Sample, reward: Any) -> None:
    """For filters, which see the reward as the function returned it."""
    kept = {**sample.metadata.get(KEPT, {}), "reward": reward, "by": "function"}
    if made.further:
        kept["further"] = made.further
    sample.metadata[KEPT] = kept


def _understood(reward: Any, key: str) -> Any:
    try:
        return parts(reward, key)
    except RolloutError as error:
        return error
