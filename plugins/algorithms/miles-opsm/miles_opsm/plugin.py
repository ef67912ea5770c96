"""Registers the loss mask `opsm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class OpsmOptions:
    """How far the policy may have left a bad sequence before it is no longer pushed away from it."""

    delta: float = 1e-4
    """Largest mean of `lp_old - lp_new` over a sequence, in nats a token."""

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise ConfigError(f"opsm: delta={self.delta} must not be negative (1e-4 is usual)")


@hookimpl
def miles_register_loss_masks() -> Mapping[str, Component]:
    return {
        "opsm": Component(
            "miles_opsm.opsm:opsm",
            options=OpsmOptions,
            needs={"advantages"},
            flags={"--use-opsm": "", "--opsm-delta": "delta"},
            summary="Off-policy sequence masking: bad sequences that the policy has left teach nothing",
            paper="arXiv:2512.02556",
        )
    }
