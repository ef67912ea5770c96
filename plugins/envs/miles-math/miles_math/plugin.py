"""Registers the rewards `exact_match` and `math`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1

Extraction = Literal["whole", "boxed", "last_line", "last_number"]


@dataclass(frozen=True)
class ExactMatchOptions:
    """What of a response is compared with the label, and how."""

    extract: Extraction = "whole"
    """The whole response, its last \\boxed{}, its last line that is not blank, or its last number."""
    pattern: str | None = None
    """Instead of `extract`: a regular expression; the last match counts, its first group if it has one."""
    strip: bool = True
    """Ignore white space around the answer, and how much of it there is inside."""
    casefold: bool = False
    """Ignore case."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"exact_match: pattern {self.pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class MathOptions:
    """How mathematical equality is decided."""

    require_boxed: bool = False
    """Only an answer in \\boxed{} counts; otherwise the last formula or number of the response does."""
    timeout: float = 5.0
    """Seconds for one comparison; what takes longer is worth 0."""
    workers: int = 2
    """Processes that compare."""

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.workers < 1:
            raise ConfigError(f"math: timeout={self.timeout} must be positive and workers={self.workers} at least 1")


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        "exact_match": Component(
            "miles_math.exact_match:ExactMatch",
            options=ExactMatchOptions,
            summary="1 when the answer is the label, letter for letter, else 0",
        ),
        "math": Component(
            "miles_math.verify:MathReward",
            options=MathOptions,
            summary="1 when the answer equals the label mathematically (math-verify), else 0",
        ),
    }
