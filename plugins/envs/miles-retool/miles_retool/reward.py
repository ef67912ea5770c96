"""Reward `retool`: mathematical equality, and a little for the programs of those who were wrong.

    right    correct                                                          1
    wrong    min(wrong + per_call * programs, most_when_wrong)                -1, -0.95, ... -0.6

The shaping is that of the retool recipes of slime and Miles (0.1 for each two calls). It keeps a policy that cannot
solve anything yet from unlearning to call its tool. Programs are counted by the environment, as they are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from miles_math.plugin import MathOptions
from miles_math.verify import MathReward

from miles.api import Sample, Score
from miles_retool.plugin import RetoolRewardOptions


class RetoolReward:
    """Judges the model's last message: what a program printed is no answer. Synchronous, called in a thread."""

    def __init__(self, options: RetoolRewardOptions):
        self.options = options
        self._math = MathReward(MathOptions(options.require_boxed, options.timeout, options.workers))

    def score(self, sample: Sample) -> Score:
        """`reward`; `correct`, 1 or 0; `programs`, how many were run.

        Raises:
            DataError: the prompt has no label.
        """
        options = self.options
        verdict = self._math.score(replace(sample, text=last_said(sample)))
        assert isinstance(verdict, Mapping)
        correct = verdict["reward"]
        programs = sample.metadata.get("environment", {}).get("programs", 0)
        wrong = min(options.wrong + options.per_call * programs, options.most_when_wrong)
        return {"reward": options.correct if correct else wrong, "correct": correct, "programs": float(programs)}


def last_said(sample: Sample) -> str:
    """What the model said last; of a sample without a conversation, its text."""
    if not sample.messages:
        return sample.text
    said = [message for message in sample.messages if message["role"] == "assistant"]
    return str(said[-1]["content"]) if said else ""
