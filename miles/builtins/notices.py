"""What a person is told during a run when something looks wrong and nothing is broken."""

from __future__ import annotations

import logging
import math
from typing import Any

from miles.api import Metrics

logger = logging.getLogger("miles")
ADVANTAGE = "train/advantage_abs"


def nothing_learned(run: Any, step: int, metrics: Metrics) -> None:
    """Say so when batches begin to have no advantage but 0, as often as it begins. `run.metrics` are those of the step
    before."""
    if metrics.get(ADVANTAGE) == 0 and run.metrics.get(ADVANTAGE) != 0:
        logger.warning(
            "step %d: all advantages are 0, so that it taught nothing. The samples of each prompt got the same reward "
            "(%g on average), or one sample a prompt (--n-samples-per-prompt) has nothing to be compared with. "
            "Read rollouts/step_%06d.jsonl",
            step + 1, metrics.get("rollout/reward", math.nan), step + 1,
        )  # fmt: skip
