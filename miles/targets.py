"""`package.module:attribute`: how code is named in configs and across processes; and where it stands, for messages."""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from difflib import get_close_matches
from typing import Any

from miles.errors import PluginLoadError


def import_target(target: str, who: str = "") -> Any:
    """The object that `package.module:attribute` names; `who` leads the message when there is none.

    Raises:
        PluginLoadError: there is no such module or attribute, or importing it failed.
    """
    lead = f"{who}: " if who else ""
    module_name, _, attribute = target.partition(":")
    try:
        thing: Any = importlib.import_module(module_name)
    except Exception as error:
        raise PluginLoadError(f"{lead}cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(thing, part):
            close = get_close_matches(part, dir(thing), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PluginLoadError(f"{lead}{module_name} has no attribute {attribute!r}{hint}")
        thing = getattr(thing, part)
    return thing


def defined_at(thing: Any) -> str:
    """` (file:line)` of a function, a class, or the class of an object; empty where Python does not know it."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing) if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    try:
        return f" ({inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]})"
    except (OSError, TypeError):
        return ""


def described(error: BaseException) -> str:
    """An error with the place that raised it, so that a person finds it in code of their own."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
