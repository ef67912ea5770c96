"""Evaluator `rollout`: the live engines answer every prompt of the held-out sets."""

from __future__ import annotations

import math

from miles.config import TaskSet
from miles.errors import ConfigError, RolloutError
from miles.protocols import EvaluationSite
from miles.rollout.concurrent import run_all
from miles.rollout.measure import SUCCESS, oldest_version, once, pass_at_k, sample_metrics
from miles.rollout.producer import sample_seed
from miles.rollout.task import Task
from miles.types import Group, Metrics, Prompt, Sample, Status


class RolloutEvaluator:
    """Generates `n_samples_per_prompt` answers to each prompt and averages their rewards.

    Seeds depend on the set, the prompt and the sample alone: two evaluations of the same weights agree, and evaluating
    more or less often changes nothing in training.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, list[Prompt]] = {}

    async def evaluate(self, run: EvaluationSite, step: int) -> dict[str, Metrics]:
        return {task_set.name: await self._evaluate_set(run, task_set) for task_set in run.config.eval.sets}

    async def _evaluate_set(self, run: EvaluationSite, task_set: TaskSet) -> Metrics:
        if task_set.name not in self._prompts:
            self._prompts[task_set.name] = run.load_prompts(task_set)
        task = run.eval_task(task_set)
        size = task_set.n_samples_per_prompt or 1
        groups = [self._group(run, prompt, i, size) for i, prompt in enumerate(self._prompts[task_set.name])]
        if not groups:
            raise ConfigError(f"eval set {task_set.name!r} ({task_set.path}) has no usable prompt")
        await run_all(self._generate(run, task, group) for group in groups)
        samples = [sample for group in groups for sample in group.samples]
        self._check_failures(run, task_set, samples)
        metrics = sample_metrics(samples)
        successes = [[s.reward is not None and s.reward >= SUCCESS for s in once(g.samples)] for g in groups]
        for k in run.config.eval.pass_k or powers_of_two(size):
            if k <= size:
                metrics[f"pass@{k}"] = pass_at_k(successes, k)
        if (version := oldest_version(samples)) is not None:
            metrics["weight_version"] = float(version)
        metrics |= {f"environment/{name}": value for name, value in task.environment_metrics().items()}
        return metrics | {"prompts": float(len(groups))}

    def _check_failures(self, run: EvaluationSite, task_set: TaskSet, samples: list[Sample]) -> None:
        """Failed samples count as wrong; when too many failed, the number would say nothing about the policy."""
        failed = [sample for sample in samples if sample.status is Status.FAILED]
        limit = run.config.rollout.max_failed_fraction
        if len(failed) > limit * len(samples):
            raise RolloutError(
                f"evaluation of {task_set.name!r}: {len(failed)} of {len(samples)} samples failed, more than "
                f"rollout.max_failed_fraction={limit}. The first, of prompt {failed[0].prompt.id}: {failed[0].error}"
            )

    def _group(self, run: EvaluationSite, prompt: Prompt, index: int, size: int) -> Group:
        seed = run.config.data.seed
        samples = [
            Sample.begin(prompt, id=-1 - (index * size + i), group_id=index, seed=sample_seed(seed, f"{prompt.id}#{i}"))
            for i in range(size)
        ]
        return Group(index, prompt, samples)

    async def _generate(self, run: EvaluationSite, task: Task, group: Group) -> None:
        attempts = run.config.rollout.max_attempts
        await task.run_group(group, attempts, lambda sample, attempt: sample_seed(sample.seed, str(attempt)))


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 ... up to `limit`; nothing when there is one sample (accuracy says it already)."""
    return [2**i for i in range(int(math.log2(limit)) + 1)] if limit > 1 else []
