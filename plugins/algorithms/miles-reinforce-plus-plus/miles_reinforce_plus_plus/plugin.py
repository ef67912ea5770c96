"""Registers the estimators `reinforce_plus_plus` and `reinforce_plus_plus_baseline`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1
PAPER = "arXiv:2501.03262"


@dataclass(frozen=True)
class ReinforcePlusPlusOptions:
    """How far a token looks ahead."""

    gamma: float = 1.0
    """Discount of what comes one trainable token later."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"reinforce_plus_plus: gamma={self.gamma} must be between 0 and 1")


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "reinforce_plus_plus": Component(
            "miles_reinforce_plus_plus.reinforce_plus_plus:reinforce_plus_plus",
            options=ReinforcePlusPlusOptions,
            needs={"kl"},
            flags={"--gamma": "gamma"},
            summary="Discounted return of each token, whitened over the batch; no group needed",
            paper=PAPER,
        ),
        "reinforce_plus_plus_baseline": Component(
            "miles_reinforce_plus_plus.reinforce_plus_plus_baseline:reinforce_plus_plus_baseline",
            needs={"kl"},
            summary="Reward relative to its group's mean, whitened over the batch",
            paper=PAPER,
        ),
    }
