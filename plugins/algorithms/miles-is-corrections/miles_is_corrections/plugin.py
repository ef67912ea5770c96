"""Registers the corrections `tis`, `mis`, `icepop` and `m2po`, and the presets `bypass` and `decoupled_ppo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1
Level = Literal["token", "sequence", "geometric"]
LevelOrNone = Literal["token", "sequence", "geometric", "none"]  # one Literal: an error then lists all four words


def bounds_of(low: float | None, high: float | None) -> tuple[float, float]:
    """Bounds as numbers, 0 and infinity where there is none."""
    return 0.0 if low is None else low, float("inf") if high is None else high


def check_bounds(who: str, low: float, high: float, names: str = "low, high") -> None:
    """Refuse bounds of a ratio that are negative, cross each other, or leave out 1.

    Raises:
        ConfigError: they do.
    """
    told = f"{who}: {names} = {low:g}, {high:g}"
    if low < 0 or high <= 0:
        raise ConfigError(f"{told}: they bound the ratio trainer / rollout, which is not negative; 1 is no mismatch")
    if not low < high:
        raise ConfigError(f"{told}: the lower bound is not below the upper")
    if low > 1 or high < 1:
        raise ConfigError(f"{told}: leave out 1, the ratio where trainer and rollout agree; use low <= 1 <= high")


@dataclass(frozen=True)
class TisOptions:
    """`w = clip(exp(l), low, high)` for each token."""

    low: float | None = 0.0
    """Lower bound of the weight; none when null."""
    high: float | None = 2.0
    """Upper bound of the weight; none when null."""

    def __post_init__(self) -> None:
        check_bounds("tis", *bounds_of(self.low, self.high))


@dataclass(frozen=True)
class IcePopOptions:
    """`w = exp(l)` where that is within `[low, high]`, else 0."""

    low: float | None = 0.5
    """Tokens of a smaller ratio are dropped; none when null."""
    high: float | None = 5.0
    """Tokens of a larger ratio are dropped; none when null."""

    def __post_init__(self) -> None:
        check_bounds("icepop", *bounds_of(self.low, self.high))
        if self.low is None and self.high is None:
            raise ConfigError("icepop: without bounds it drops nothing; for weights alone use {name: tis, high: null}")


@dataclass(frozen=True)
class M2poOptions:
    """Drop the tokens that are farthest off, until the mean of `l^2` is small."""

    threshold: float = 0.04
    """What the mean of `l^2` over the tokens that are left must be below."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(
                f"m2po: threshold={self.threshold} must be above 0: it is a mean of squares (0.04 is usual)"
            )


@dataclass(frozen=True)
class MisOptions:
    """Weights at one level, rejection at another, a veto, normalisation. Each may be left out."""

    level: LevelOrNone = "token"
    """What the weight is the ratio of: each token, a sample's product, its geometric mean; `none` for no weights."""
    mode: Literal["truncate", "clip", "mask"] = "truncate"
    """Weights outside the bounds: cut to `high` alone, cut to both, or left as they are and their tokens dropped."""
    low: float | None = None
    """Lower bound of the weight's ratio; `1 / high` when null."""
    high: float = 2.0
    """Upper bound of the weight's ratio."""
    reject_level: LevelOrNone = "token"
    """What is dropped by the ratio of: tokens, or whole samples by their product or geometric mean; `none`: nothing."""
    reject_low: float | None = None
    """Ratios below are dropped; `low` when null."""
    reject_high: float | None = None
    """Ratios above are dropped; `high` when null."""
    veto: float | None = 1e-4
    """A sample with a token whose ratio is below this is dropped; no veto when null."""
    normalize: bool | None = None
    """Divide weights by their mean over the batch. When null: yes, but not at levels `geometric` and `none`."""

    def __post_init__(self) -> None:
        check_bounds("mis", *self.bounds)
        check_bounds("mis", *self.reject_bounds, "reject_low, reject_high")
        if self.veto is not None and not 0 < self.veto < 1:
            raise ConfigError(f"mis: veto={self.veto} must be between 0 and 1, such as 1e-4, or null for no veto")
        if self.level == "none":
            self._check_without_weights()
        if self.level == "geometric" and self.normalize:
            raise ConfigError(
                "mis: normalize with level geometric: geometric means are near 1 by themselves, and dividing by their "
                "mean would undo what they correct; leave normalize out"
            )
        if self.reject_level == "none" and (self.reject_low, self.reject_high) != (None, None):
            raise ConfigError(
                "mis: reject_low and reject_high bound what is dropped, and reject_level is none: name one"
            )

    def _check_without_weights(self) -> None:
        if self.reject_level == "none" and self.veto is None:
            raise ConfigError("mis: no level, no reject_level, no veto: it does nothing; use is_correction: none")
        if self.mode != "truncate" or self.normalize:
            what = f"mode={self.mode}" if self.mode != "truncate" else "normalize"
            raise ConfigError(f"mis: {what} is about weights, and level is none: leave it out, or name a level")

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the weight's ratio."""
        return (1 / self.high if self.high else 0.0) if self.low is None else self.low, self.high

    @property
    def reject_bounds(self) -> tuple[float, float]:
        """Of the ratio that rejection looks at."""
        low, high = self.bounds
        return (
            low if self.reject_low is None else self.reject_low,
            high if self.reject_high is None else self.reject_high,
        )

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their mean."""
        return self.level in ("token", "sequence") if self.normalize is None else self.normalize


def _flags(name: str, *options: str) -> dict[str, str]:
    return {f"--{name}-{option.replace('_', '-')}": option for option in options}


@hookimpl
def miles_register_is_corrections() -> Mapping[str, Component]:
    return {
        "tis": Component(
            "miles_is_corrections.tis:tis",
            options=TisOptions,
            needs={"rollout_log_probs"},
            flags={"--use-tis": "", "--tis-clip": "high", "--tis-clip-low": "low"},
            summary="Truncated importance sampling: token weights, clipped",
            paper="Ionides 2008; Yao et al. 2025",
        ),
        "mis": Component(
            "miles_is_corrections.mis:mis",
            options=MisOptions,
            needs={"rollout_log_probs"},
            flags=_flags(
                "mis", "level", "mode", "low", "high", "reject_level", "reject_low", "reject_high", "veto", "normalize"
            ),
            summary="Weights and rejection, each by token, sequence or geometric mean; veto; normalisation",
            paper="Liu, Li et al. 2025: https://richardli.xyz/rl-collapse",
        ),
        "icepop": Component(
            "miles_is_corrections.icepop:icepop",
            options=IcePopOptions,
            needs={"rollout_log_probs"},
            flags=_flags("icepop", "low", "high"),
            summary="Token weights; tokens outside the bounds are dropped",
            paper="arXiv:2510.18855",
        ),
        "m2po": Component(
            "miles_is_corrections.m2po:m2po",
            options=M2poOptions,
            needs={"rollout_log_probs"},
            flags=_flags("m2po", "threshold"),
            summary="Drops the tokens that are farthest off, until the mean squared log-ratio is small",
            paper="arXiv:2510.01161",
        ),
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "bypass": {"algorithm": {"old_logprobs": "rollout", "is_correction": "none"}},
        "decoupled_ppo": {
            "algorithm": {
                "policy_loss": "ppo_clip",
                "old_logprobs": "recompute",
                "is_correction": {"name": "icepop", "low": None, "high": 5.0},
            }
        },
    }
