"""Options of the built-in components, apart from the code they configure: reading them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.api import ConfigError, import_target, tool_of


@dataclass(frozen=True)
class PpoClipOptions:
    """The ratio new / old is clipped to `[1 - eps, 1 + eps_high]`."""

    eps: float = 0.2
    """How far the ratio may fall."""
    eps_high: float | None = None
    """How far it may rise; `eps` when not given. More than `eps` is DAPO's clip-higher."""
    eps_clip_c: float | None = None
    """Dual clip: the largest loss per unit of negative advantage, above 1 (3 is usual); off when not given."""

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ConfigError(f"ppo_clip: eps={self.eps} must be between 0 and 1")
        if self.eps_high is not None and self.eps_high < 0:
            raise ConfigError(f"ppo_clip: eps_high={self.eps_high} must not be negative")
        if self.eps_clip_c is not None and self.eps_clip_c <= 1:
            raise ConfigError(f"ppo_clip: eps_clip_c={self.eps_clip_c} must be above 1 (3 is usual)")


@dataclass(frozen=True)
class EnvironmentRewardOptions:
    """How the rewards of an environment's turns become one scalar."""

    reduction: Literal["sum", "mean", "max", "min", "last"] = "sum"
    """Over the turns that the environment rewarded."""
    nonterminal: float | None = None
    """Reward of a trajectory that the environment did not end; the reduction of its turns when not given."""
    min: float | None = None
    """Lower bound of the result."""
    max: float | None = None
    """Upper bound of the result."""

    def __post_init__(self) -> None:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(f"environment reward: min={self.min} is above max={self.max}")


@dataclass(frozen=True)
class TemplateOptions:
    """How the models of a template write what the template does not say."""

    calls: Literal["auto", "hermes", "llama", "mistral"] = "auto"
    """Notation of tool calls; `auto` goes by the template."""


@dataclass(frozen=True)
class ToolsOptions:
    """Python functions that the model may call."""

    functions: tuple[str, ...]
    """`module:function` of each."""
    timeout: float = 30.0
    """Seconds for a call."""
    max_result_length: int = 4000
    """Characters of a result; the rest is left out."""

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.max_result_length <= 0:
            raise ConfigError("tools: timeout and max_result_length must be above 0")

    def preflight(self) -> None:
        """Each function is there, and can be offered."""
        for name in self.functions:
            tool_of(import_target(name, "environment tools"))


@dataclass(frozen=True)
class DiskOptions:
    """Where weights lie on their way, and how much of them."""

    dir: str = ""
    """Of this run alone, and seen by trainer and engines; `weights/` of the run directory when empty."""
    mode: Literal["full", "delta"] = "full"
    """Whole checkpoints, or after the first one what has changed."""
    encoding: Literal["xor", "overwrite"] = "xor"
    """Of changed bytes: new ^ old for all, or places and new values of those that changed."""
    compression: Literal["auto", "zstd", "zlib", "none"] = "auto"
    """Of changed bytes: zstd where it is installed, else zlib."""
