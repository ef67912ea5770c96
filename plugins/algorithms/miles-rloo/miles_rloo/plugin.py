"""Registers the estimator `rloo`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, hookimpl

MILES_API = 1


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "rloo": Component(
            "miles_rloo.rloo:rloo",
            summary="Reward relative to the mean of the others in its group",
            paper="arXiv:2402.14740",
        )
    }
