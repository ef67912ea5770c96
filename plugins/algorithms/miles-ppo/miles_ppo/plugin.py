"""Registers the estimator `gae` and the preset `ppo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class GaeOptions:
    """How far a token looks ahead."""

    gamma: float = 1.0
    """Discount of what comes one trainable token later."""
    lam: float = 1.0
    """1 trusts rewards alone, 0 the critic's next value alone."""

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ConfigError(f"gae: {name}={value} must be between 0 and 1")


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "gae": Component(
            "miles_ppo.gae:gae",
            options=GaeOptions,
            needs={"critic", "kl"},
            flags={"--gamma": "gamma", "--lambd": "lam"},
            summary="Reward to come, relative to what a critic expected (GAE)",
            paper="arXiv:1506.02438",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "ppo": {
            "algorithm": {
                "advantage_estimator": "gae",
                "policy_loss": "ppo_clip",
                "normalize_advantages": True,
            }
        }
    }
