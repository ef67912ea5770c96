"""Weights on their way to an engine, as data.

Trainer and engine may live in different processes. What a weight sync hands to an engine is therefore not the weights
but how to get at them: a function, by its name, and its arguments. The engine opens it where it lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.targets import import_target
from miles.types import WeightGroup


@dataclass(frozen=True)
class Shipment:
    """Opens to an iterable of weight groups, to be walked once: `target(**arguments)` in the receiving process.

    Drawing the next group tells the sender that the one before it has been copied.
    """

    target: str
    """`package.module:function`, of the weight sync."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Names and numbers; nothing that is bound to a process."""


def opened(payload: Any) -> Iterable[WeightGroup]:
    """What a payload holds; groups that came as they are need no opening."""
    return import_target(payload.target)(**payload.arguments) if isinstance(payload, Shipment) else payload
