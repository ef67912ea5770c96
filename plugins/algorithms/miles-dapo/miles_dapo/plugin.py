"""Registers the reward `soft_overlong` and the preset `dapo`, and refuses what contradicts the penalty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1
SOFT_OVERLONG = "soft_overlong"
SHARE = 5
"""The penalty grows over the last fifth of the limit: the paper's 4,096 of 20,480 tokens."""


@dataclass(frozen=True)
class SoftOverlongOptions:
    """Where the penalty begins, where it ends, and how large it is there."""

    buffer_len: int | None = None
    """Tokens before the limit over which it grows; a fifth of the limit when not given."""
    max_len: int | None = None
    """The limit, where it is largest; the longest response of the sample's task set when not given."""
    factor: float = 1.0
    """How large it is at the limit."""

    def __post_init__(self) -> None:
        for name in ("buffer_len", "max_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"soft_overlong: {name}={value} must be at least 1 token")
        if self.max_len is not None and self.begins(self.max_len) <= 0:
            raise ConfigError(
                f"soft_overlong: buffer_len={self.buffer_len} must be less than max_len={self.max_len}: a response of "
                "any length would be penalised"
            )
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"soft_overlong: factor={self.factor} must be a positive number; the penalty is minus it")

    def buffer(self, limit: int) -> float:
        return limit / SHARE if self.buffer_len is None else self.buffer_len

    def begins(self, limit: int) -> float:
        """The longest response that is not penalised."""
        return limit - self.buffer(limit)


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        SOFT_OVERLONG: Component(
            "miles_dapo.soft_overlong:SoftOverlong",
            options=SoftOverlongOptions,
            provides=("data.reward_terms",),
            flags={
                "--overlong-buffer-len": "buffer_len",
                "--overlong-max-len": "max_len",
                "--overlong-penalty-factor": "factor",
            },
            summary="0, and from some length on down to -1 at the longest response",
            paper="arXiv:2503.14476",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "dapo": {
            "algorithm": {
                "advantage_estimator": "grpo",
                "policy_loss": {"name": "ppo_clip", "eps": 0.2, "eps_high": 0.28},
                "loss_aggregation": "token_mean",
            },
            "data": {"reward_terms": [SOFT_OVERLONG]},
            "rollout": {"filters": ["agreeing_rewards"]},
        }
    }


@hookimpl
def miles_configure(config: Any) -> None:
    """Refuse a penalty that no response, or every response, would get, or that no token would feel."""
    problems = [
        f"data.sets.{task_set.name}: soft_overlong: {problem}"
        for task_set in config.data.sets
        for spec in (*task_set.reward, *config.data.reward_terms)
        if spec.name.rpartition("/")[2] == SOFT_OVERLONG
        for problem in _problems(SoftOverlongOptions(**spec.options), task_set.sampling.max_new_tokens, config)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(options: SoftOverlongOptions, longest: int, config: Any) -> Iterator[str]:
    """What is wrong with the penalty in a training set whose responses have `longest` tokens at most."""
    limit = longest if options.max_len is None else options.max_len
    begins, truncated = options.begins(limit), config.algorithm.truncated
    if begins <= 0:
        yield (
            f"buffer_len={options.buffer_len} is not less than the limit, sampling.max_new_tokens={longest}: "
            "a response of any length would be penalised. Lower --overlong-buffer-len or raise "
            "--rollout-max-response-len"
        )
    elif begins >= longest:
        yield (
            f"it begins after {begins:g} tokens, and no response has more than sampling.max_new_tokens={longest}: "
            "nothing would be penalised. Lower --overlong-max-len, or leave it out"
        )
    if truncated != "keep" and limit >= longest:
        yield (
            f"responses that reach the limit get the largest penalty, and algorithm.truncated={truncated!r} takes just "
            "these out of the loss. Use --truncated-samples keep, an --overlong-max-len below "
            f"sampling.max_new_tokens={longest}, or no penalty (--reward-terms with other rewards; "
            "data.reward_terms: [] in a file)"
        )
