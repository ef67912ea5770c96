"""Commands that plugins bring: entry points of group `miles.commands`, a command's name -> its module."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from miles.errors import PluginConflictError, PluginLoadError

GROUP = "miles.commands"
ELSEWHERE = {"search": "miles-search-r1", "serve": "miles-serve"}
"""Commands that packages of this repository bring -> what to install."""


def brought() -> dict[str, str]:
    """Command -> one line of help. Commands of ours that are not installed say what to install."""
    lines = {name: f"comes with a plugin: pip install {package}" for name, package in ELSEWHERE.items()}
    return lines | {point.name: _summary(point) for point in entry_points(group=GROUP)}


def load(command: str) -> Any:
    """The module of a command of `brought`.

    Raises:
        PluginLoadError: the plugin that brings it is not installed, or the module cannot be imported.
        PluginConflictError: several plugins bring it.
    """
    points = entry_points(group=GROUP, name=command)
    if not points:
        raise PluginLoadError(f"`miles {command}` comes with a plugin: pip install {ELSEWHERE[command]}")
    (point, *others) = points
    if others:
        owners = " and ".join(sorted(_owner(point) for point in points))
        raise PluginConflictError(f"`miles {command}` is brought by {owners}: uninstall one of them")
    try:
        return point.load()
    except ImportError as error:
        raise PluginLoadError(f"`miles {command}` of {_owner(point)} cannot be imported: {error}") from error


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _summary(point: EntryPoint) -> str:
    return str(point.dist.metadata["Summary"]) if point.dist else point.value
