"""Registers the policy loss `dppo_tv` and the preset `dppo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class DppoOptions:
    """How far a token's probability may move before its gradient stops."""

    delta: float = 0.15
    """How far it may fall."""
    delta_high: float | None = None
    """How far it may rise; `delta` when not given."""
    truncation: float | None = 20.0
    """Largest importance weight of a token; none when null. Large: a tight one takes the gradient of rare tokens."""

    def __post_init__(self) -> None:
        for name in ("delta", "delta_high"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(
                    f"dppo_tv: {name}={value} must be between 0 and 1: it is a difference of probabilities"
                )
        if self.truncation is not None and self.truncation < 1:
            raise ConfigError(f"dppo_tv: truncation={self.truncation} must be at least 1 (20 is usual)")


@hookimpl
def miles_register_policy_losses() -> Mapping[str, Component]:
    return {
        "dppo_tv": Component(
            "miles_dppo.dppo:dppo_tv",
            options=DppoOptions,
            needs={"advantages"},
            flags={"--dppo-delta": "delta", "--dppo-delta-high": "delta_high", "--dppo-truncation": "truncation"},
            summary="Policy gradient within a trust region of token probabilities",
            paper="arXiv:2602.04879",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "dppo": {
            "algorithm": {
                "advantage_estimator": "grpo",
                "policy_loss": {"name": "dppo_tv", "delta": 0.15, "truncation": 20.0},
                "old_logprobs": "rollout",
                "loss_aggregation": "token_mean",
            }
        }
    }
