"""What a reward function of upstream returned, as a reward of miles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.api import RolloutError


def parts(reward: Any, key: str) -> dict[str, float]:
    """The scalar under `reward`, and every other number under its name.

    Args:
        key: which entry of a mapping is the scalar.

    Raises:
        RolloutError: there is no such entry, or it is no number.
    """
    if not isinstance(reward, Mapping):
        if key:
            raise RolloutError(f"--reward-key {key}: the function returned {reward!r}, which is no mapping")
        return {"reward": _number(reward, "the function returned")}
    if not key or key not in reward:
        problem = f"--reward-key {key} is not among them" if key else "--reward-key says which is the reward"
        raise RolloutError(f"the function returned a mapping with {', '.join(map(str, reward))}: {problem}")
    others = {str(name): value for name, value in reward.items() if name not in (key, "reward")}
    numbers = {name: float(value) for name, value in others.items() if isinstance(value, int | float)}
    return {**numbers, "reward": _number(reward[key], f"--reward-key {key}: it is")}


def scalar(reward: Any, key: str, name: str) -> tuple[float, dict[str, float]]:
    """The scalar, and named parts as the core writes them for a reward called `name`."""
    told = parts(reward, key)
    return told["reward"], {name if each == "reward" else f"{name}/{each}": value for each, value in told.items()}


def _number(value: Any, lead: str) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise RolloutError(f"{lead} {value!r}, which is no number") from error
