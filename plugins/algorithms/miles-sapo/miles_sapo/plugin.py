"""Registers the policy loss `sapo` and the preset of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class SapoOptions:
    """How fast the gradient fades as the ratio leaves 1: the larger a temperature, the faster."""

    tau_pos: float = 1.0
    """Of tokens with a positive advantage."""
    tau_neg: float = 1.05
    """Of the others, whose updates are the less stable ones."""

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"sapo: {name}={getattr(self, name)} must be above 0")


@hookimpl
def miles_register_policy_losses() -> Mapping[str, Component]:
    return {
        "sapo": Component(
            "miles_sapo.sapo:sapo",
            options=SapoOptions,
            needs={"advantages"},
            flags={"--sapo-tau-pos": "tau_pos", "--sapo-tau-neg": "tau_neg"},
            summary="A sigmoid gate of the ratio in the place of the clip",
            paper="arXiv:2511.20347",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "sapo": {
            "algorithm": {
                "advantage_estimator": "grpo",
                "policy_loss": {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
                "loss_aggregation": "sample_mean",
            }
        }
    }
