"""`rollout.rm_hub`: the run's reward function, for generate functions that ask for it themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from miles.api import ConfigError
from miles_compat.calling import called, load_function
from miles_compat.upstream import Sample

__all__ = ["async_rm", "batched_async_rm"]


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """What the function of --custom-rm-path, or the sample's own, says of one sample."""
    return await called(_function(sample.custom_rm_path or args.custom_rm_path), args, sample, **kwargs)


async def batched_async_rm(args: Any, samples: Sequence[Sample], **kwargs: Any) -> list[Any]:
    """What it says of several: asked once, with the list, unless each has a function of its own."""
    inplace = kwargs.pop("inplace_set_reward_field", False)
    if args.custom_rm_path is not None:
        rewards = list(await called(_function(args.custom_rm_path), args, list(samples), **kwargs))
    else:
        rewards = list(await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples)))
    for sample, reward in zip(samples, rewards, strict=True) if inplace else ():
        sample.reward = reward
    return rewards


def _function(path: str | None) -> Any:
    if not path:
        raise ConfigError(
            "a generate function asks for a reward (rm_hub.async_rm), and there is no --custom-rm-path: the rewards of "
            "miles are asked by miles itself, after it"
        )
    return load_function(path)
