"""The soft overlong penalty: a reward that falls while a response nears its limit.

    0                        up to L - B tokens
    (L - B - length) / B     from there on
    -1                       at L and above                       arXiv:2503.14476, equation 13

The policy is told that it runs out of room before it is cut off. `length` is that of the longest turn, because the
limit of a task set, `L` unless one is given, holds for every turn by itself: a conversation is not penalised for having
many turns. Samples that were cut from one trajectory share one reward, and so the penalty of the longest turn of any.
What others said (an environment's tokens) does not count; the token that ends a turn does.
"""

from __future__ import annotations

from miles.api import ConfigError, Group, Sample
from miles_dapo.plugin import SoftOverlongOptions


class SoftOverlong:
    """`factor` times the penalty, and the part `overlong`: 1 for a sample that got any."""

    def __init__(self, options: SoftOverlongOptions):
        self.options = options

    async def score_group(self, group: Group) -> list[dict[str, float]]:
        """One answer a sample. Samples of one trajectory share its reward: see `miles.training.statistics`."""
        worst: dict[int, dict[str, float]] = {}
        for sample in group.samples:
            score = self.score(sample)
            worst[sample.rollout_id] = min(score, worst.get(sample.rollout_id, score), key=lambda said: said["reward"])
        return [worst[sample.rollout_id] for sample in group.samples]

    def score(self, sample: Sample) -> dict[str, float]:
        """Raises ConfigError when neither the options nor the sample say what the limit is."""
        limit = self.options.max_len or sample.max_new_tokens
        if limit is None:
            raise ConfigError(
                f"soft_overlong: sample {sample.id} does not say how long a response may be; give max_len "
                "(--overlong-max-len)"
            )
        length = max((turn.end - turn.start for turn in sample.turns), default=sample.trainable_tokens)
        room = self.options.begins(limit) - length
        penalty = max(min(room, 0.0) / self.options.buffer(limit), -1.0)
        return {"reward": self.options.factor * penalty, "overlong": float(room < 0)}
