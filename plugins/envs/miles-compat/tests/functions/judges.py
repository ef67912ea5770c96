"""Reward functions and filters in every signature that slime and Miles call."""

import numpy as np
from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.utils.types import Sample


async def exact(args, sample, **kwargs):
    assert isinstance(sample, Sample)
    return 1.0 if sample.response.removesuffix("<|im_end|>").strip() == str(sample.label) else 0.0


async def as_mapping(args, sample, **kwargs):
    right = await exact(args, sample)
    return {"score": 2 * right - 1, "acc": bool(right), "pred": sample.response}


async def of_a_group(args, samples, **kwargs):
    assert isinstance(samples, list)
    longest = max(sample.response_length for sample in samples)
    return [sample.response_length / longest for sample in samples]


async def of_either(args, sample, **kwargs):
    if isinstance(sample, list):
        return [await exact(args, one) for one in sample]
    return await exact(args, sample)


async def too_few(args, samples, **kwargs):
    return [1.0]


def at_once(args, sample, **kwargs):
    return len(sample.response)


async def with_label_and_metadata(args, sample, **kwargs):
    return sample.metadata["level"] + len(sample.label) + getattr(sample, "tool_calls", 0)


async def failing(args, sample, **kwargs):
    raise RuntimeError("the judge is ill")


def disagreeing(args, samples, **kwargs):
    rewards = [sample.get_reward_value(args) for sample in samples]
    keep = max(rewards) > min(rewards)
    return DynamicFilterOutput(keep=keep, reason=None if keep else f"all_{rewards[0]:g}")


def unsure(args, samples, **kwargs):
    return np.array([True, False])


def any_right(args, samples, **kwargs):
    return any(sample.reward for sample in samples)
