"""Registers `slime_function`: a generate function, a reward and a sample filter that call functions of upstream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.api import Component, ConfigError, hookimpl
from miles_compat.current import current

MILES_API = 1
NAME = "slime_function"


def _check_path(where: str, path: str) -> None:
    if path and not path.replace(":", ".").strip(".").count("."):
        raise ConfigError(f"{where}: path={path!r} names no function: write my_module.my_function")


def _load(*paths: str) -> None:
    from miles_compat.calling import load_function

    for path in filter(None, paths):
        load_function(path)


@dataclass(frozen=True)
class GenerateOptions:
    """Which function generates, and what `args` holds besides the settings of the run."""

    path: str = ""
    """`my_module.my_function`, also with a colon; upstream's own single turn where it is empty."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further attributes of `args`, for every function of upstream in the run. They go over what the run says."""
    config_path: str = ""
    """A YAML file with more of them, below `args`."""
    sample_hooks: tuple[str, ...] = ()
    """Functions that see each sample after it was generated and before it is judged, in this order."""

    def __post_init__(self) -> None:
        for path in (self.path, *self.sample_hooks):
            _check_path("generate: slime_function", path)

    def preflight(self) -> None:
        """The functions are there, and the one that generates can be called. A class is only imported."""
        from miles_compat.generate import checked_function

        checked_function(self.path)
        _load(*self.sample_hooks)


@dataclass(frozen=True)
class RewardOptions:
    """Which function judges, and what of its answer is the reward."""

    path: str = ""
    """`my_module.my_function`; where it is empty, the generate function has to reward."""
    reward_key: str = ""
    """The scalar among what is returned as a mapping. Numbers beside it become named parts."""
    group_rm: bool = False
    """Judge all samples of a prompt in one call, with a list in place of the sample."""

    def __post_init__(self) -> None:
        _check_path("reward: slime_function", self.path)

    def preflight(self) -> None:
        """The function is there."""
        _load(self.path)


@dataclass(frozen=True)
class FilterOptions:
    """Which function keeps groups."""

    path: str
    """`my_module.my_function`."""

    def __post_init__(self) -> None:
        _check_path("rollout.filters: slime_function", self.path or "none")

    def preflight(self) -> None:
        """The function is there."""
        _load(self.path)


@hookimpl
def miles_configure(config: Any) -> None:
    current.begin(config)


@hookimpl
def miles_on_run_start(run: Any) -> None:
    current.run = run


@hookimpl
def miles_on_run_end(run: Any, error: BaseException | None) -> None:
    current.end()


@hookimpl
def miles_register_generate_functions() -> Mapping[str, Component]:
    return {
        NAME: Component(
            "miles_compat.generate:SlimeGenerate",
            options=GenerateOptions,
            flags={
                "--custom-generate-function-path": "path",
                "--custom-config-path": "config_path",
                "--rollout-sample-hook-path": "sample_hooks",
            },
            provides=("--custom-generate-function-path", "--rollout-sample-hook-path"),
            summary="A generate function written for slime or Miles, which asks SGLang's /generate",
        )
    }


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        NAME: Component(
            "miles_compat.reward:SlimeReward",
            options=RewardOptions,
            flags={"--custom-rm-path": "path", "--reward-key": "reward_key", "--group-rm": "group_rm"},
            provides=("--custom-rm-path",),
            summary="A reward function written for slime or Miles",
        )
    }


@hookimpl
def miles_register_sample_filters() -> Mapping[str, Component]:
    return {
        NAME: Component(
            "miles_compat.filter:SlimeFilter",
            options=FilterOptions,
            flags={"--dynamic-sampling-filter-path": "path"},
            provides=("--dynamic-sampling-filter-path",),
            summary="A dynamic sampling filter written for slime or Miles",
        )
    }
