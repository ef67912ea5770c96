"""Values that are fine alone and contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from miles.config.components import Use
from miles.config.faults import Fault, Origin
from miles.config.leaves import Path
from miles.config.schema import Config
from miles.registry import Registry


def check(
    config: Config, uses: Sequence[Use], registry: Registry, origin: Callable[[Path], Origin], purpose: str
) -> list[Fault]:
    return []
