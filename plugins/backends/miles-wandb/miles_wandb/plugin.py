"""Registers the tracker `wandb`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from miles.api import Component, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class WandbOptions:
    """Where a run appears. What is not given is decided by wandb: its environment variables, then its defaults."""

    project: str = "miles"
    """Project of the run."""
    team: str | None = None
    """Team or user that owns it (wandb's entity)."""
    group: str | None = None
    """Group of runs it is shown with."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline needs no network: `wandb sync` uploads the run later."""
    host: str | None = None
    """Address of a self-hosted server."""
    dir: str | None = None
    """Where wandb writes; the run directory when not given."""
    run_id: str | None = None
    """Id of a run to go on with; kept in the run directory, so that a resumed run finds its own."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


@hookimpl
def miles_register_trackers() -> Mapping[str, Component]:
    return {
        "wandb": Component(
            "miles_wandb.tracker:WandbTracker",
            options=WandbOptions,
            flags={
                "--wandb-project": "project",
                "--wandb-team": "team",
                "--wandb-group": "group",
                "--wandb-mode": "mode",
                "--wandb-host": "host",
                "--wandb-dir": "dir",
                "--wandb-run-id": "run_id",
            },
            summary="Weights & Biases, online or offline",
        )
    }
