"""Registers the policy loss `cispo` and the preset of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class CispoOptions:
    """The importance weight of a token is clipped to `[1 - eps, 1 + eps_high]`; both are distances from 1."""

    eps: float | None = None
    """How far a weight may fall; no lower bound when not given, as in the paper."""
    eps_high: float = 4.0
    """How far it may rise: a token counts five times at most."""

    def __post_init__(self) -> None:
        if self.eps is not None and self.eps < 0:
            raise ConfigError(f"cispo: eps={self.eps} must not be negative")
        if self.eps_high < 0:
            raise ConfigError(f"cispo: eps_high={self.eps_high} must not be negative; it is a distance from 1")


@hookimpl
def miles_register_policy_losses() -> Mapping[str, Component]:
    return {
        "cispo": Component(
            "miles_cispo.cispo:cispo",
            options=CispoOptions,
            needs={"advantages"},
            flags={"--eps-clip": "eps", "--eps-clip-high": "eps_high"},
            summary="-A log p, weighted by the clipped ratio, detached",
            paper="arXiv:2506.13585",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "cispo": {
            "algorithm": {
                "advantage_estimator": "grpo",
                "policy_loss": {"name": "cispo", "eps": None, "eps_high": 4.0},
                "loss_aggregation": "token_mean",
            }
        }
    }
