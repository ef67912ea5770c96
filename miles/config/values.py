"""From text on a command line to a value, as the type of its setting says. What does not fit stays text: checking
it, with a good message, is the schema's work."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

import yaml

from miles.config.base import RewardSpec, Spec

NONE = ("none", "null", "~")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Text(str):
    """A value that was typed on a command line and waits for its type to be known."""


def from_text(text: str, annotation: Any) -> Any:
    """`text` as `annotation`: `1,2` or `[1, 2]` for lists, `a=1,b=2` or `{a: 1}` for mappings, `none` for None."""
    text = str(text)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return from_text(text, args[0])
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in NONE:
            return None
        return _first_fit(text, [arg for arg in args if arg is not type(None)])
    if origin is Literal:
        return next((arg for arg in args if str(arg) == text), text)
    if annotation is bool:
        return _BOOLS.get(text.lower(), text)
    if annotation in (int, float):
        return _number(text, annotation)
    if origin in (tuple, list):
        return _list(text, args[0] if args else Any)
    if origin is dict or annotation is dict:
        return _mapping(text)
    if annotation is Spec:
        return _structure(text) if text[:1] == "{" else text
    return _structure(text) if annotation is Any else text


def item_type(annotation: Any) -> Any:
    """What the items of a list are; str when it is no list."""
    for member in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(member) in (tuple, list):
            return typing.get_args(member)[0]
    return str


def _first_fit(text: str, members: list[Any]) -> Any:
    for member in members:
        value = from_text(text, member)
        if not isinstance(value, str) or member is str:
            return value
    return text


def _number(text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _list(text: str, item: Any) -> Any:
    if text[:1] in ("[", "{"):
        return _structure(text)
    inner = typing.get_args(item)[0] if typing.get_origin(item) is Annotated else item
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if inner is RewardSpec and "=" in text:
        return _mapping(text)
    return [from_text(part, item) if inner not in (Spec, RewardSpec) else part for part in parts]


def _mapping(text: str) -> Any:
    if text[:1] == "{":
        return _structure(text)
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        return text
    return {key.strip(): _structure(value.strip()) for key, _, value in pairs}


def _structure(text: str) -> Any:
    """YAML, of which JSON is a part; text that is neither stays text."""
    from miles.config.yaml_file import Loader

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text
