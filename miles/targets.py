"""`package.module:attribute`: how code is named in configs and across processes."""

from __future__ import annotations

import importlib
from typing import Any


def import_target(target: str) -> Any:
    """The object that `package.module:attribute` names. Raises ImportError or AttributeError as Python does."""
    module, _, attribute = target.partition(":")
    thing: Any = importlib.import_module(module)
    for part in attribute.split("."):
        thing = getattr(thing, part)
    return thing
