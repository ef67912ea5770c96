"""Weights on their way to an engine, as data.

Trainer and engine may live in different processes. What a weight sync hands to an engine is therefore not the weights
but how to get at them: a function, by its name, and its arguments. The engine opens it where it lives.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    changes: bool = False
    """What is sent says how weights differ from those that the engine holds: `target(held, **arguments)`."""


@contextmanager
def opened(payload: Any, held: Iterable[WeightGroup] = ()) -> Iterator[Iterable[WeightGroup]]:
    """What a payload holds, closed in the end however far it was walked: a sender waits for whoever stops halfway.
    Groups that came as they are need no opening.

    Args:
        held: what the engine has now, under checkpoint names; only walked if the payload needs it.
    """
    groups = payload
    if isinstance(payload, Shipment):
        groups = import_target(payload.target)(*((held,) if payload.changes else ()), **payload.arguments)
    try:
        yield groups
    finally:
        if close := getattr(groups, "close", None):
            close()


def this_process() -> str:
    """Names this process among all those of a run: tensors can be handed over within one."""
    return f"{socket.gethostname()}:{os.getpid()}"
