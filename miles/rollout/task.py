"""A task set at work: from a prompt to generated, rewarded samples."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from miles.config import Config, Spec, TaskSet
from miles.conformance import judgement
from miles.log import logger
from miles.modeling import generate_function_for
from miles.protocols import ChatFormat, GenerateContext, Score
from miles.registry import Registry
from miles.rollout.concurrent import run_all
from miles.rollout.engines import EngineFront
from miles.types import Group, Sample, Status

JUDGED = (Status.COMPLETED, Status.TRUNCATED)
"""Samples that came to an end, and so can be judged and trained."""


class Task:
    """One `TaskSet` with its components built. A bad rollout is data (FAILED), never an exception."""

    def __init__(
        self, task_set: TaskSet, config: Config, registry: Registry, front: EngineFront, chat: ChatFormat, **limits: Any
    ):
        self.set = task_set
        self.generate = generate_function_for(registry, task_set, front.generates)
        self.rewards = [(r.name, r.weight, _judge(registry, r)) for r in task_set.reward]
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
        results = await run_all(self._run(sample, attempts, reseed) for sample in group.samples)
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
                sample.status, sample.error = Status.FAILED, _describe(error)
                finished = [sample]
            if not any(s.status in (Status.FAILED, Status.ABORTED) for s in finished):
                break
        return finished

    # -------------------------------------------------------------------------------------------------------- rewards

    async def _reward_group(self, group: Group) -> None:
        """Fill in `reward` and `reward_parts`; a reward that raises fails the samples it was asked about."""
        for name, weight, judge in self.rewards:
            judged = replace(group, samples=[s for s in group.samples if s.status in JUDGED])
            if not judged.samples:
                return
            try:
                scores = list(await judge(judged))
                if len(scores) != len(judged.samples):
                    raise ValueError(f"{len(scores)} scores for {len(judged.samples)} samples")
            except Exception as error:
                logger.debug("reward %s failed on group %s", name, group.id, exc_info=True)
                scores = [error] * len(judged.samples)
            for sample, score in zip(judged.samples, scores, strict=True):
                _add_score(sample, name, weight, score)


Judge = Callable[[Group], Awaitable[Iterable[Score | BaseException]]]


def _judge(registry: Registry, spec: Any) -> Judge:
    """A reward as an asynchronous function of a group. What is synchronous runs in a thread."""
    reward = registry.build("rewards", Spec(name=spec.name, options=spec.options))
    by, score = judgement(reward)
    if by == "score_group":
        return score if _is_async(score) else _threaded(score)
    return partial(_score_all, score) if _is_async(score) else _threaded(partial(_score_all_now, score))


def _threaded(function: Callable[[Group], Any]) -> Judge:
    async def judge(group: Group) -> Any:
        return await asyncio.to_thread(function, group)

    return judge


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


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


def _add_score(sample: Sample, name: str, weight: float, score: Score | BaseException) -> None:
    """Add one judge's score; whatever is no score fails the sample, which then has no reward at all."""
    try:
        parts = _parts(score)
    except Exception as error:
        sample.status, sample.reward = Status.FAILED, None
        sample.error = f"reward {name}: {_describe(error)}"
        return
    sample.reward_parts.update({name if k == "reward" else f"{name}/{k}": value for k, value in parts.items()})
    sample.reward = (sample.reward or 0.0) + weight * parts["reward"]


def _parts(score: Score | BaseException) -> dict[str, float]:
    if isinstance(score, BaseException):
        raise score
    parts = score if isinstance(score, Mapping) else {"reward": score}
    if "reward" not in parts:
        raise ValueError(f"it returned a mapping without 'reward': {sorted(parts)}")
    wrong = {name: value for name, value in parts.items() if not hasattr(value, "__float__")}
    if wrong:
        raise TypeError(
            f"it returned {score!r}; a number is expected, or a mapping from names to numbers with 'reward'"
        )
    if not math.isfinite(float(parts["reward"])):
        raise ValueError(f"it returned {score!r}; a finite number is expected")
    return {name: float(value) for name, value in parts.items()}


def _describe(error: BaseException) -> str:
    """An error with the place that raised it, so that a person finds it in code of their own."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
