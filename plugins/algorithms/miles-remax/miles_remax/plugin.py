"""Registers the estimator `remax`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@hookimpl
def miles_configure(config) -> None:
    """Refuse a filter that drops what this estimator learns from."""
    filters = [spec.name for spec in config.rollout.filters]
    if config.algorithm.advantage_estimator.name.endswith("remax") and "agreeing_rewards" in filters:
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
