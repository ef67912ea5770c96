"""Registers the estimator `remax`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@hookimpl
def miles_configure(config) -> None:
    """Refuse a filter that drops what this estimator learns from."""
    names = [spec.name.rpartition("/")[2] for spec in (config.algorithm.advantage_estimator, *config.rollout.filters)]
    if names[0] == "remax" and "agreeing_rewards" in names:
        raise ConfigError(
            "rollout.filters: agreeing_rewards drops groups whose rewards agree, which teach `remax` as long as they "
            "differ from the greedy one: leave the filter out (--preset dapo brings it), or use another estimator"
        )


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
