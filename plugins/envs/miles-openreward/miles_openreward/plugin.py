"""Registers the environment `openreward` and the reward `openreward`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1
NAME = "openreward"
API_KEY = "OPENREWARD_API_KEY"
"""Environment variable with the key of an account on openreward.ai."""
PAID = "paid"
"""Among what the environment notes on a sample: what each call was paid that was."""


@dataclass(frozen=True)
class OpenRewardOptions:
    """Where the environments are served, and what their model is told. Which one, and which task, says the row."""

    base_url: str | None = None
    """Server of your own, such as `http://127.0.0.1:8080`; openreward.ai when not given."""
    secrets: tuple[str, ...] = field(default=(), repr=False)  # errors do not repeat values that were put there
    """Names of what the environments may be told in confidence. Each is the value of the environment variable of that
    name, or of the name in capitals."""
    system_prompt_template: str | None = None
    """System message, with `{tools}` where the tools are listed, one JSON object a line, and `{{` for a brace. Without
    it the model's own chat template shows the tools."""
    run_name: str | None = None
    """Name of the run under which trajectories are uploaded to openreward.ai; they are not when not given."""

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"openreward: base_url={self.base_url!r} is no address: http://HOST:PORT")
        if self.system_prompt_template is not None:
            system_prompt(self.system_prompt_template, "")

    def preflight(self) -> None:
        """Secrets that are missing are noticed before anything is built."""
        self.confidential()

    def confidential(self) -> dict[str, str]:
        """Secret -> its value.

        Raises:
            ConfigError: no environment variable holds it; or openreward.ai is needed, and there is no key for it.
        """
        if not os.environ.get(API_KEY) and (self.base_url is None or self.run_name is not None):
            hosts = "hosts the environments (a server of your own is base_url)"
            why = hosts if self.base_url is None else "is to get the trajectories (run_name)"
            raise ConfigError(f"openreward: openreward.ai {why}, and {API_KEY} is not set")
        found = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in self.secrets}
        if missing := [name for name, value in found.items() if not value]:
            raise ConfigError(f"openreward: secrets are taken from the environment: set {', '.join(missing)}")
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True)
class OpenRewardRewardOptions:
    """How what an environment paid becomes the reward of a trajectory."""

    nonterminal_reward: float | None = None
    """Paid once more, at the end, to a trajectory that its environment did not finish."""
    reward_reduction: Literal["sum", "mean", "max", "min"] = "sum"
    """Over all calls that were paid (all turns, of another environment); 0 where none was."""
    min_reward: float | None = None
    """Lower bound of the result."""
    max_reward: float | None = None
    """Upper bound of the result."""

    def __post_init__(self) -> None:
        low, high = self.min_reward, self.max_reward
        if low is not None and high is not None and low > high:
            raise ConfigError(f"openreward: min_reward={low} is above max_reward={high}")


def system_prompt(template: str, tools: str) -> str:
    """Raises ConfigError when the template has no place for tools, or a brace that is not doubled."""
    try:
        prompt = template.format(tools=tools)
    except (LookupError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"openreward: system_prompt_template: {error!r}: besides {{tools}}, braces are written twice: {{{{ and }}}}"
        ) from error
    if prompt == template.format(tools=f"{tools}?"):
        raise ConfigError("openreward: system_prompt_template has no {tools}: nothing tells the model of its tools")
    return prompt


@hookimpl
def miles_register_environments() -> Mapping[str, Component]:
    return {
        NAME: Component(
            "miles_openreward.environment:OpenReward",
            options=OpenRewardOptions,
            flags={"--openreward-url": "base_url", "--openreward-run-name": "run_name"},
            summary="Environments of the Open Reward Standard, hosted on openreward.ai or served anywhere",
        )
    }


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        NAME: Component(
            "miles_openreward.reward:OpenRewardReward",
            options=OpenRewardRewardOptions,
            summary="What an environment paid: sum, mean, max or min, within bounds",
        )
    }
