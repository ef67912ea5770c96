"""Do engine and trainer hold the same weights? Both score the same tokens; the difference tells.

The tokens are random: every row of the embedding, every expert and every layer has a say in their log-probabilities,
so a tensor that did not arrive shows, whatever the policy has learned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch

from miles.errors import WeightSyncError
from miles.protocols import RolloutEngine, WorkerGroup
from miles.training.table import Table

SEQUENCES, LENGTH = 4, 48


class WeightProbe:
    """Compares log-probabilities after a weight sync."""

    def __init__(self, vocab_size: int, tolerance: float, temperature: float, max_length: int | None = None):
        """`max_length`: the most tokens that engine and trainer take in one sequence, where that may be few."""
        self.tolerance, self.temperature = tolerance, temperature
        length = LENGTH if max_length is None else min(LENGTH, max_length)
        tokens = np.random.default_rng(0).integers(0, vocab_size, (SEQUENCES, length))
        ids = torch.arange(SEQUENCES)
        self.table = Table(list(tokens), {}, torch.zeros(SEQUENCES), group_N=ids, rollout_N=ids)

    async def trainer(self, workers: WorkerGroup) -> np.ndarray:
        """`[SEQUENCES, length]`: the trainer's log-probabilities."""
        results = await workers.call("forward", "actor", [self.table], ("log_probs",))
        return np.stack(results[0][0]["log_probs"])

    async def compare(self, expected: np.ndarray, engines: Sequence[RolloutEngine], version: int) -> float:
        """Largest mean difference per token over all engines.

        Raises:
            WeightSyncError: it is larger than the tolerance.
        """
        differences = []
        for engine in engines:
            scores = await asyncio.gather(*(engine.score(t.tolist(), self.temperature) for t in self.table.tokens))
            differences.append(float(np.abs(np.stack(scores) - expected).mean()))
        worst = max(differences, default=0.0)
        if not worst <= self.tolerance:
            index = differences.index(worst)
            raise WeightSyncError(
                f"after the sync of version {version}, engine {index} and trainer disagree: their log-probabilities of "
                f"the same tokens differ by {worst:.3g} on average, {self.tolerance:.3g} is tolerated. Some weights "
                "did not arrive, or under another name: check the bridge and the weight sync. If the difference comes "
                "from number formats, raise --weight-sync-tolerance."
            )
        return worst
