"""`rollout.filter_hub`: what a filter returns, and upstream's own two filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

from miles_compat.upstream import Sample, Status

__all__ = ["DynamicFilterOutput", "check_no_aborted", "check_reward_nonzero_std"]
NO_SPREAD = 1e-6


@dataclass
class DynamicFilterOutput:
    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False
    """slime's wish to keep a group rather than to draw once more. Nobody asks for it here: a batch is filled."""


def check_reward_nonzero_std(args: Any, samples: Sequence[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups whose rewards differ."""
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    keep = len(rewards) > 1 and pstdev(rewards) > NO_SPREAD
    return DynamicFilterOutput(keep, None if keep else f"zero_std_{round(rewards[0], 1)}")


def check_no_aborted(args: Any, samples: Sequence[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups of which no sample was aborted."""
    aborted = any(sample.status is Status.ABORTED for sample in samples)
    return DynamicFilterOutput(not aborted, "group_has_aborted" if aborted else None)
