"""Registers the estimator `remax`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, hookimpl

MILES_API = 1


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "remax": Component(
            "miles_remax.remax:remax",
            needs={"greedy_rollout"},
            summary="Reward relative to that of the prompt's greedy rollout",
            paper="arXiv:2310.10505",
        )
    }
