"""Registers the estimator `maxrl`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, hookimpl

MILES_API = 1


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "maxrl": Component(
            "miles_maxrl.maxrl:maxrl",
            needs={"kl"},
            summary="Reward relative to its group, in units of the group's mean: hard prompts weigh most",
            paper="arXiv:2602.02710",
        )
    }
