"""Reward `exact_match`: 1 when the answer is the label, else 0."""

from __future__ import annotations

import re
from collections.abc import Callable

from miles.api import Sample
from miles_math.answers import labels_of, last_boxed, last_line, last_number, without_reasoning
from miles_math.plugin import ExactMatchOptions

EXTRACT: dict[str, Callable[[str], str | None]] = {
    "whole": lambda text: text,
    "boxed": last_boxed,
    "last_line": last_line,
    "last_number": last_number,
}


class ExactMatch:
    """Compares strings. An answer that cannot be found is worth 0."""

    def __init__(self, options: ExactMatchOptions):
        self.options = options
        self._pattern = re.compile(options.pattern) if options.pattern is not None else None

    async def score(self, sample: Sample) -> float:
        """Raises DataError when the prompt has no label."""
        labels = labels_of(sample)
        answer = self.answer(without_reasoning(sample.text))
        return float(answer is not None and self._normal(answer) in map(self._normal, labels))

    def answer(self, text: str) -> str | None:
        """The part of a response that is compared, or None."""
        if self._pattern is None:
            return EXTRACT[self.options.extract](text)
        matches = list(self._pattern.finditer(text))
        return matches[-1].group(1 if self._pattern.groups else 0) if matches else None

    def _normal(self, text: str) -> str:
        if self.options.strip:
            text = " ".join(text.split())
        return text.casefold() if self.options.casefold else text
