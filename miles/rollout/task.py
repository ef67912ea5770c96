"""A task set at work: from a prompt to generated, rewarded samples."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from miles.config import Config, Spec, TaskSet
from miles.errors import ConfigError
from miles.log import logger
from miles.protocols import ChatFormat, GenerateContext, Score
from miles.registry import Registry
from miles.rollout.engines import EngineFront
from miles.types import Group, Sample, Status

AUTO = Spec(name="auto")


class Task:
    """One `TaskSet` with its components built. A bad rollout is data (FAILED), never an exception."""

    def __init__(
        self, task_set: TaskSet, config: Config, registry: Registry, front: EngineFront, chat: ChatFormat, **limits: Any
    ):
        self.set = task_set
        self.generate = registry.build("generate_functions", _generate_spec(task_set, front.generates))
        self.rewards = [(r.name, r.weight, _reward(registry, r)) for r in task_set.reward]
        sampling = task_set.sampling.params()
        stop_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *chat.stop_token_ids)))
        environment = task_set.environment
        self.context = GenerateContext(
            generate=front.generate,
            chat=chat,
            sampling=replace(sampling, stop_token_ids=stop_ids),
            make_environment=partial(registry.build, "environments", environment) if environment else None,
            max_turns=task_set.max_turns,
            **limits,
        )

    async def run_group(self, group: Group, attempts: int, reseed: Callable[[Sample, int], int]) -> Group:
        """Generate and reward every sample of the group."""
        results = await asyncio.gather(*(self._run(sample, attempts, reseed) for sample in group.samples))
        group.samples = [sample for siblings in results for sample in siblings]
        await self._reward_group(group)
        return group

    async def _run(self, sample: Sample, attempts: int, reseed: Callable[[Sample, int], int]) -> list[Sample]:
        """Generate one sample, again with another seed when it failed."""
        finished = [sample]
        for attempt in range(attempts):
            if attempt:
                fresh = Sample.begin(sample.prompt, id=sample.id, group_id=sample.group_id)
                fresh.seed = reseed(sample, attempt)
                sample = fresh
            try:
                result = await self.generate(self.context, sample)
                finished = result if isinstance(result, list) else [result]
            except Exception as error:
                logger.debug("sample %s failed", sample.id, exc_info=True)
                sample.status, sample.error = Status.FAILED, f"{type(error).__name__}: {error}"
                finished = [sample]
            if not any(s.status in (Status.FAILED, Status.ABORTED) for s in finished):
                break
        return finished

    # -------------------------------------------------------------------------------------------------------- rewards

    async def _reward_group(self, group: Group) -> None:
        """Fill in `reward` and `reward_parts`; a reward that raises fails its sample."""
        todo = [s for s in group.samples if s.status in (Status.COMPLETED, Status.TRUNCATED)]
        if not self.rewards or not todo:
            return
        for name, weight, (score_group, sync) in self.rewards:
            judged = replace(group, samples=[s for s in todo if s.status is not Status.FAILED])
            if not sync:
                scores = await score_group(judged)
            else:
                scores = await asyncio.to_thread(score_group, judged)
            for sample, score in zip(judged.samples, scores, strict=True):
                _add_score(sample, name, weight, score)


def _generate_spec(task_set: TaskSet, generates: bool) -> Spec:
    """`auto`: SFT when there is no engine, turns when there is an environment, else one turn."""
    if task_set.generate != AUTO:
        return task_set.generate
    if not generates:
        return Spec(name="dataset")
    return Spec(name="multi_turn" if task_set.environment else "single_turn")


GroupScorer = Callable[[Group], Any]


def _reward(registry: Registry, spec: Any) -> tuple[GroupScorer, bool]:
    """A reward as a function of a group, and whether it must run in a thread because it is synchronous."""
    reward = registry.build("rewards", Spec(name=spec.name, options=spec.options))
    if hasattr(reward, "score_group"):
        method = reward.score_group
        return method, not inspect.iscoroutinefunction(method)
    score = getattr(reward, "score", reward)
    if not callable(score):
        raise ConfigError(f"reward {spec.name!r} offers neither score(sample) nor score_group(group)")
    if inspect.iscoroutinefunction(score) or inspect.iscoroutinefunction(getattr(score, "__call__", None)):  # noqa: B004
        return partial(_score_all, score), False
    return partial(_score_all_now, score), True


async def _score_all(score: Callable[[Sample], Awaitable[Score]], group: Group) -> list[Score | Exception]:
    return await asyncio.gather(*(score(sample) for sample in group.samples), return_exceptions=True)  # type: ignore[return-value]


def _score_all_now(score: Callable[[Sample], Score], group: Group) -> list[Score | Exception]:
    scores: list[Score | Exception] = []
    for sample in group.samples:
        try:
            scores.append(score(sample))
        except Exception as error:
            scores.append(error)
    return scores


def _add_score(sample: Sample, name: str, weight: float, score: Score | Exception) -> None:
    if isinstance(score, BaseException):
        sample.status, sample.error = Status.FAILED, f"reward {name}: {type(score).__name__}: {score}"
        return
    if isinstance(score, Mapping):
        if "reward" not in score:
            sample.status, sample.error = Status.FAILED, f"reward {name}: no key 'reward' in {sorted(score)}"
            return
        sample.reward_parts.update({f"{name}/{k}": float(v) for k, v in score.items() if k != "reward"})
        value = float(score["reward"])
    else:
        value = float(score)
    sample.reward_parts[name] = value
    sample.reward = (sample.reward or 0.0) + weight * value


def usable(samples: Sequence[Sample], needs_reward: bool) -> list[Sample]:
    """Samples that may be trained: finished, and rewarded where rewards are needed."""
    done = (Status.COMPLETED, Status.TRUNCATED)
    return [s for s in samples if s.status in done and (s.reward is not None or not needs_reward)]
