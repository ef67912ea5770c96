"""What a person is told during a run when something looks wrong and nothing is broken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from miles.api import Group, Metrics

logger = logging.getLogger("miles")
AGREEING = "rollout/groups_agreeing"


def nothing_to_compare(run: Any, groups: Sequence[Group], metrics: Metrics) -> None:
    """Say so when a batch begins to have the same reward for all samples of every prompt, as often as it begins.

    An estimator that compares the samples of a prompt (GRPO and its kin) then gives every token the advantage 0. One
    that compares them with a greedy rollout does not.
    `run` is the `miles.run.Run`; its `metrics` are those of the step before.
    """
    judged = run.config.algorithm.advantage_estimator.name != "none" and any(
        len(g.samples) > 1 and g.baseline_reward is None for g in groups
    )
    if judged and metrics.get(AGREEING) == 1 and run.metrics.get(AGREEING) != 1:
        logger.warning(
            "step %d: the samples of each prompt all got the same reward (%g on average): there is nothing to learn "
            "from by comparing them. Read rollouts/step_%06d.jsonl",
            run.step + 1, metrics["rollout/reward"], run.step + 1,
        )  # fmt: skip
