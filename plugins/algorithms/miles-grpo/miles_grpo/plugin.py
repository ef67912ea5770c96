"""Registers the estimators `grpo` and `dr_grpo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class GrpoOptions:
    """How a group's rewards are scaled."""

    epsilon: float = 1e-6
    """Added to the standard deviation."""
    normalize_std: bool = True
    """Divide by the group's standard deviation."""

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise ConfigError(f"grpo: epsilon={self.epsilon} must not be negative")


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "grpo": Component(
            "miles_grpo.grpo:grpo",
            options=GrpoOptions,
            flags={"--grpo-epsilon": "epsilon", "--grpo-std-normalization": "normalize_std"},
            summary="Reward relative to its group: (R - mean) / std",
            paper="arXiv:2402.03300",
        ),
        "dr_grpo": Component(
            "miles_grpo.grpo:dr_grpo",
            summary="Reward relative to its group: R - mean; for loss aggregation `constant`",
            paper="arXiv:2503.20783",
        ),
    }
