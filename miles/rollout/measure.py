"""Metrics of a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.experts import missing_experts
from miles.types import ROUTED_EXPERTS, WEIGHT_VERSION, Group, Metrics, Sample, Status

SUCCESS = 1.0
"""A sample of at least this reward is counted as a success in `accuracy` and pass@k."""


def batch_metrics(groups: Sequence[Group]) -> Metrics:
    """Rewards, accuracy, lengths and statuses of a batch."""
    samples = [sample for group in groups for sample in group.samples]
    metrics = sample_metrics(samples)
    rewards = [group.rewards_G for group in groups]
    agreeing = [r for r in rewards if r and max(r) == min(r)]
    if any(rewards):
        metrics["groups_agreeing"] = len(agreeing) / len(groups)
    baselines = [group.baseline_reward for group in groups if group.baseline_reward is not None]
    if baselines:
        metrics["baseline_reward"] = float(np.mean(baselines))
    return {f"rollout/{name}": value for name, value in metrics.items()}


def once(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each trajectory: siblings that were cut from one share its reward, and count once."""
    found: dict[int, Sample] = {}
    for sample in samples:
        found.setdefault(sample.rollout_id, sample)
    return list(found.values())


def sample_metrics(samples: Sequence[Sample]) -> Metrics:
    """The same without groups and without a prefix. A failed sample is no success; the mean reward leaves it out.
    Whether one is a success is the task's own to say, without `data.reward_terms`. Lengths, turns and statuses are
    those of samples, rewards those of trajectories."""
    lengths = np.array([s.response_length for s in samples]) if samples else np.zeros(1)
    metrics: Metrics = {
        "response_len/mean": float(lengths.mean()),
        "response_len/max": float(lengths.max()),
        "response_len/min": float(lengths.min()),
        "truncated_ratio": _share(samples, Status.TRUNCATED),
        "failed_ratio": _share(samples, Status.FAILED),
        "turns/mean": float(np.mean([len(s.turns) for s in samples])) if samples else 0.0,
    }
    if any(ROUTED_EXPERTS in s.columns for s in samples):
        ended = [s for s in samples if s.status not in (Status.FAILED, Status.ABORTED)]
        metrics["routed_experts_missing"] = float(sum(map(missing_experts, ended)))
    judged = once(samples)
    rewards = np.array([s.reward for s in judged if s.reward is not None])
    if len(rewards):
        successes = sum(s.task_reward is not None and s.task_reward >= SUCCESS for s in judged)
        metrics |= {"reward": float(rewards.mean()), "accuracy": successes / len(judged)}
    for part in sorted({name for s in judged for name in s.reward_parts}):
        values = [s.reward_parts[part] for s in judged if part in s.reward_parts]
        metrics[f"reward_parts/{part}"] = float(np.mean(values))
    return metrics


def oldest_version(samples: Sequence[Sample]) -> int | None:
    """Of the weights that have drawn a token of them; None where none have."""
    return min((int(versions.min()) for versions in _drawn_by(samples)), default=None)


def staleness_metrics(groups: Sequence[Group], version: int) -> Metrics:
    """How many weight versions the oldest token of each sample is behind `version`, and how many samples have tokens of
    several."""
    drawn = _drawn_by([sample for group in groups for sample in group.samples])
    ages = np.array([version - int(versions.min()) for versions in drawn])
    if not drawn:
        return {}
    mixed = float(np.mean([versions.min() != versions.max() for versions in drawn]))
    shares = {f"share_{age}": float(np.mean(ages == age)) for age in range(int(ages.max()) + 1)}
    found = {"mean": float(ages.mean()), "max": float(ages.max()), "mixed_versions": mixed, **shares}
    return {f"rollout/staleness/{name}": value for name, value in found.items()}


def _drawn_by(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Weight versions of the tokens of each sample that has any of the model's."""
    columns = [s.columns[WEIGHT_VERSION.name] for s in samples if WEIGHT_VERSION.name in s.columns]
    return [drawn for versions in columns if len(drawn := versions[versions >= 0])]


def pass_at_k(successes: Sequence[Sequence[bool]], k: int) -> float:
    """Unbiased pass@k over prompts: `1 - C(n - c, k) / C(n, k)` (arXiv:2107.03374). Prompts with fewer than k samples
    do not count; NaN when none has enough."""
    chances = []
    for outcomes in successes:
        n, c = len(outcomes), sum(outcomes)
        if n >= k:
            chances.append(1.0 - float(np.prod([(n - c - i) / (n - i) for i in range(k)])))
    return float(np.mean(chances)) if chances else float("nan")


def _share(samples: Sequence[Sample], status: Status) -> float:
    return sum(s.status is status for s in samples) / max(len(samples), 1)
