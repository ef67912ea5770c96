"""Registers the policy loss `gspo` and the preset of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class GspoOptions:
    """The ratio of a sequence is clipped to `[1 - eps, 1 + eps_high]`: a mean over its tokens, it moves far less than
    that of a token."""

    eps: float = 3e-4
    """How far the ratio may fall."""
    eps_high: float | None = None
    """How far it may rise; `eps` when not given."""
    eps_clip_c: float | None = None
    """Dual clip: the largest loss per unit of negative advantage, above 1; off when not given."""

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ConfigError(f"gspo: eps={self.eps} must be between 0 and 1 (3e-4 is usual)")
        if self.eps_high is not None and self.eps_high < 0:
            raise ConfigError(f"gspo: eps_high={self.eps_high} must not be negative")
        if self.eps_clip_c is not None and self.eps_clip_c <= 1:
            raise ConfigError(f"gspo: eps_clip_c={self.eps_clip_c} must be above 1")


@hookimpl
def miles_register_policy_losses() -> Mapping[str, Component]:
    return {
        "gspo": Component(
            "miles_gspo.gspo:gspo",
            options=GspoOptions,
            needs={"advantages"},
            flags={"--eps-clip": "eps", "--eps-clip-high": "eps_high", "--eps-clip-c": "eps_clip_c"},
            summary="Clipped surrogate of the sequence ratio exp(mean log r)",
            paper="arXiv:2507.18071",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "gspo": {
            "algorithm": {
                "advantage_estimator": "grpo",
                "policy_loss": {"name": "gspo", "eps": 3e-4, "eps_high": 4e-4},
                "loss_aggregation": "sample_mean",
            }
        }
    }
