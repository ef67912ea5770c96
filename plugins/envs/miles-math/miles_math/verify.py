"""Reward `math`: 1 when the answer equals the label mathematically, as math-verify sees it, else 0.

Symbolic comparison may take for ever, and nothing within a process can stop it (its library's own time limit needs
the main thread, and `10**10**10` does not even let a signal through). So it happens in worker processes, which are
killed when they overrun. An answer that is the label letter for letter needs none of that.
"""

from __future__ import annotations

import logging

from miles.api import Sample, Score
from miles_math.answers import labels_of, last_boxed, without_reasoning
from miles_math.plugin import MathOptions
from miles_math.pool import WorkerPool, shared_pool

TAIL = 2000
"""Characters at the end of a response in which an answer outside of a box is looked for."""
logger = logging.getLogger("miles")


class MathReward:
    """Mathematical equality. Synchronous: rollouts call it in a thread."""

    def __init__(self, options: MathOptions):
        self.options = options
        self._pool: WorkerPool = shared_pool(options.workers)
        self._warned = False

    def score(self, sample: Sample) -> Score:
        """`reward`, and `answered`: whether there was an answer that could be read.

        Raises:
            DataError: the prompt has no label.
        """
        labels = [final(label) for label in labels_of(sample)]
        text = without_reasoning(sample.text)
        boxed = last_boxed(text)
        if boxed is None and (self.options.require_boxed or not text.strip()):
            return {"reward": 0.0, "answered": 0.0}
        if (text if boxed is None else boxed).strip() in labels:
            return {"reward": 1.0, "answered": 1.0}
        answer = text[-TAIL:] if boxed is None else rf"\boxed{{{boxed}}}"
        verdict = self._pool.compare(labels, answer, self.options.timeout)
        if verdict is None:
            self._warn(sample)
            return {"reward": 0.0, "answered": 0.0}
        return {"reward": float(verdict["correct"]), "answered": float(verdict["answered"])}

    def _warn(self, sample: Sample) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "reward math: comparing sample %s took more than %s s; such answers are worth 0 (told once)",
                sample.id,
                self.options.timeout,
            )


def final(label: str) -> str:
    """The answer that a label states: what follows `####` (GSM8K), what is boxed, or all of it."""
    label = label.rpartition("####")[2]
    boxed = last_boxed(label)
    return (label if boxed is None else boxed).strip()
