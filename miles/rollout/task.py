"""A task set at work: from a prompt to generated, rewarded samples."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from miles.config import Config, TaskSet
from miles.config.components import needs_of
from miles.conformance import judgement
from miles.environments import EnvironmentLimits, Environments, RolloutHalted
from miles.errors import EngineLostError, HookError, WeightSyncError, WorkerError
from miles.log import logger
from miles.modeling import generate_function_for
from miles.protocols import ChatFormat, GenerateContext, Score
from miles.registry import Registry
from miles.rollout.concurrent import run_all
from miles.rollout.engines import EngineFront
from miles.targets import defined_at, described
from miles.turns import RESTARTED
from miles.types import Group, Metrics, Sample, Status

JUDGED = (Status.COMPLETED, Status.TRUNCATED)
"""Samples that came to an end, and so can be judged and trained."""
SIBLINGS = 1 << 40
"""Between the ids of two siblings that their generate function gave the same one."""
RETRIED = "retried"
"""Key of `Sample.metadata`: errors of the attempts before this one."""
HOPELESS = (HookError, WorkerError, EngineLostError, WeightSyncError)
"""No component, or no engine, is as it should be: no other sample can do better."""
EXPECTED = "a finite number is expected, or a mapping of names to numbers with a finite 'reward'"


class Task:
    """One `TaskSet` with its components built. A bad rollout is data (FAILED), never an exception.

    What is an exception: an environment that is not what `miles.protocols` says (`HookError`), engines that are lost.
    Training tasks add `data.reward_terms` to what their set's own rewards say; evaluation does not.
    """

    def __init__(
        self,
        task_set: TaskSet,
        config: Config,
        registry: Registry,
        front: EngineFront,
        chat: ChatFormat,
        *,
        evaluation: bool = False,
        max_context_tokens: int | None = None,
    ):
        self.set, self.front = task_set, front
        self.generate = generate_function_for(registry, task_set, front.generates)
        terms = () if evaluation else config.data.reward_terms
        self.rewards, self.terms = (
            [(r.name, r.weight, registry.build("rewards", r)) for r in specs] for specs in (task_set.reward, terms)
        )
        sampling = task_set.sampling.params()
        stop_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *chat.stop_token_ids)))
        environment, most = task_set.environment, EnvironmentLimits(**task_set.environment_limits.model_dump())
        build = partial(registry.build, "environments", environment)
        self.environments = Environments(build, most, lambda: front.closed) if environment else None
        self.context = GenerateContext(
            generate=front.generate,
            chat=chat,
            sampling=replace(sampling, stop_token_ids=stop_ids),
            make_environment=self.environments,
            max_context_tokens=max_context_tokens,
            max_turns=task_set.max_turns,
            evaluation=evaluation,
            routed_experts=not evaluation and "routed_experts" in needs_of(config, registry, "moe"),
        )
        greedy = replace(self.context.sampling, temperature=0.0)
        self.greedy = replace(self.context, sampling=greedy, routed_experts=False)  # never trained

    def environment_metrics(self) -> Metrics:
        """`Environments.metrics`: since they were last asked for."""
        return self.environments.metrics() if self.environments else {}

    async def run_group(self, group: Group, attempts: int, reseed: Callable[[Sample, int], int]) -> Group:
        """Generate and reward every sample of the group, and its baseline, which is judged alone.

        When the gate is closed meanwhile, the group comes back with samples that are pending, and nothing is judged:
        the next call goes on with those.
        """
        runs = [self._run(self.context, group, sample, attempts, reseed) for sample in group.samples]
        if group.baseline is not None:
            runs.append(self._run(self.greedy, group, group.baseline, attempts, reseed))
        results = await run_all(runs)
        if group.baseline is not None:
            group.baseline = results.pop()[0]  # siblings of one trajectory share its reward
        group.samples = [sample for siblings in results for sample in siblings]
        if unfinished(group):
            return group
        if group.baseline is not None:
            group.baseline.loss_mask[:] = 0
            await self._reward_group(replace(group, samples=[group.baseline], baseline=None))
            group.baseline_reward = group.baseline.reward
        await self._reward_group(group)
        return group

    async def _run(
        self,
        context: GenerateContext,
        group: Group,
        sample: Sample,
        attempts: int,
        reseed: Callable[[Sample, int], int],
    ) -> list[Sample]:
        """Generate one sample of a group, or the rest of it; again with another seed when it failed."""
        finished, attempt, closings = [sample], 0, self.front.closings
        if sample.status is not Status.PENDING:
            return finished
        context = replace(context, generate=partial(self.front.generate, affinity=sample.group_id))
        while True:
            finished = await self._generate(context, sample)
            statuses = {s.status for s in finished}
            if Status.ABORTED in statuses and (self.front.closed or self.front.closings != closings):
                if len(finished) > 1:  # of siblings, nobody but their generate function can tell where to go on
                    finished = [afresh(sample)]
                finished[0].status = Status.PENDING
                return finished
            attempt += 1
            if attempt == attempts or not statuses & {Status.FAILED, Status.ABORTED}:
                break
            before = [*sample.metadata.get(RETRIED, ()), finished[0].error or finished[0].status.value]
            failed = sample
            sample = Sample.begin(sample.prompt, id=sample.id, group_id=sample.group_id, seed=reseed(sample, attempt))
            sample.metadata[RETRIED] = before
            _replace(group, failed, sample)  # whoever asks how old the group is, sees no token of before
        for one in finished:
            one.max_new_tokens = context.sampling.max_new_tokens
        return finished

    async def _generate(self, context: GenerateContext, sample: Sample) -> list[Sample]:
        """What the generate function makes of a sample; what it raises is noted on the sample."""
        try:
            result = await self.generate(context, sample)
            if finished := (result if isinstance(result, list) else [result]):
                return _with_ids_of_their_own(finished)
            sample.error = "its generate function returned no sample"
        except HOPELESS:
            raise
        except RolloutHalted:
            sample.status = Status.ABORTED
            return [sample]
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _being_cancelled():
                raise
            logger.debug("sample %s failed", sample.id, exc_info=True)
            sample.error = described(error)
        sample.status = Status.FAILED
        return [sample]

    # -------------------------------------------------------------------------------------------------------- rewards

    async def _reward_group(self, group: Group) -> None:
        """Fill in `reward` and `reward_parts`. Terms are added to a reward that is there, and never stand for one."""
        await self._judge(group, self.rewards)
        if self.terms:
            rewarded = [sample for sample in group.samples if sample.reward is not None]
            for sample in rewarded:
                sample.reward_before_terms = sample.reward
            await self._judge(replace(group, samples=rewarded), self.terms)

    async def _judge(self, group: Group, rewards: Sequence[tuple[str, float, Any]]) -> None:
        """Add these rewards; one that raises fails the samples it was asked about."""
        for name, weight, reward in rewards:
            judged = replace(group, samples=[s for s in group.samples if s.status in JUDGED])
            if not judged.samples:
                return
            try:
                scores = await _scores(reward, judged)
            except Exception as error:
                logger.debug("reward %s failed on group %s", name, group.id, exc_info=True)
                scores = [error] * len(judged.samples)
            if hopeless := next((score for score in scores if isinstance(score, HOPELESS)), None):
                raise hopeless
            if len(scores) != len(judged.samples):
                wrong = ValueError(f"it returned {len(scores)} scores for {len(judged.samples)} samples")
                scores = [wrong] * len(judged.samples)
            for sample, score in zip(judged.samples, scores, strict=True):
                _add_score(sample, name, weight, reward, score)


def _replace(group: Group, before: Sample, after: Sample) -> None:
    if group.baseline is before:
        group.baseline = after
    group.samples = [after if sample is before else sample for sample in group.samples]


def _with_ids_of_their_own(siblings: list[Sample]) -> list[Sample]:
    known: set[int] = set()
    for number, sample in enumerate(siblings):
        if sample.id in known:
            sample.id += number * SIBLINGS
        known.add(sample.id)
    return siblings


def unfinished(group: Group) -> bool:
    return any(sample.status is Status.PENDING for sample in group.rollouts)


def afresh(sample: Sample) -> Sample:
    """The same sample from its prompt, which says of itself that it lost what it had, if it had anything."""
    fresh = Sample.begin(sample.prompt, id=sample.rollout_id, group_id=sample.group_id, seed=sample.seed)
    if times := sample.metadata.get(RESTARTED, 0) + bool(sample.turns):
        fresh.metadata[RESTARTED] = times
    return fresh


def _being_cancelled() -> bool:
    """By us. What else was cancelled, somewhere in the depths of a client, is an error like others."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def _scores(reward: Any, group: Group) -> list[Score | BaseException]:
    """What a reward says of each sample. What is synchronous runs in a thread."""
    by, score = judgement(reward)
    is_async = inspect.iscoroutinefunction(score) or inspect.iscoroutinefunction(type(score).__call__)
    if by == "score_group":
        return list(await score(group) if is_async else await asyncio.to_thread(score, group))
    if is_async:
        return await asyncio.gather(*(score(sample) for sample in group.samples), return_exceptions=True)
    return await asyncio.to_thread(_score_all, score, group)


def _score_all(score: Callable[[Sample], Score], group: Group) -> list[Score | BaseException]:
    scores: list[Score | BaseException] = []
    for sample in group.samples:
        try:
            scores.append(score(sample))
        except Exception as error:
            scores.append(error)
    return scores


def _add_score(sample: Sample, name: str, weight: float, reward: Any, score: Score | BaseException) -> None:
    """Add one judge's score; whatever is no score fails the sample, which then has no reward at all."""
    parts: Mapping[str, Any] = score if isinstance(score, Mapping) else {"reward": score}
    try:
        numbers = {part: value.__float__() for part, value in parts.items()}
        sound = math.isfinite(numbers["reward"])
    except Exception:  # whatever somebody's objects raise: they are no numbers
        sound = False
    if not sound:
        what = described(score) if isinstance(score, BaseException) else f"it returned {score!r}; {EXPECTED}"
        sample.status, sample.reward = Status.FAILED, None
        sample.error = f"reward {name}{defined_at(reward)}: {what}"
        return
    sample.reward_parts.update({name if k == "reward" else f"{name}/{k}": value for k, value in numbers.items()})
    sample.reward = (sample.reward or 0.0) + weight * numbers["reward"]
