"""Options of components: a dataclass or a pydantic model says what may be set; everything wrong is found at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from miles.errors import HookError

REQUIRED = "must be given"
"""What is wrong with an option that has no default, and is not there."""


@dataclass(frozen=True)
class OptionFault:
    """One thing that is wrong with a component's options."""

    key: str
    """The option, dotted when nested; empty when several contradict each other."""
    value: Any
    problem: str

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.problem}" if self.key else self.problem


@dataclass(frozen=True)
class Option:
    """What one option may be."""

    name: str
    annotation: Any
    default: Any
    """`MISSING` (of dataclasses) when it must be given."""
    shown: bool = True
    """Whether errors repeat what was given. Of a field with `repr=False` they say its type alone."""


@cache
def options_of(kind: type | None) -> dict[str, Option]:
    """Name -> option, in declaration order; empty when there are none."""
    if kind is None:
        return {}
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {
            field.name: Option(field.name, hints[field.name], _default_of(field), field.repr)
            for field in fields(kind)
            if field.init
        }
    if issubclass(kind, BaseModel):
        return {
            name: Option(name, info.annotation, MISSING if info.is_required() else default(), info.repr)
            for name, info in kind.model_fields.items()
            for default in [partial(info.get_default, call_default_factory=True)]
        }
    raise HookError(f"{kind.__module__}.{kind.__qualname__} declares options but is no dataclass and no pydantic model")


def _default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def takes_any(kind: type | None) -> bool:
    """Whether unknown options are passed on, as an engine that wraps another program does (pydantic `extra=allow`)."""
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_config.get("extra") == "allow"


def read_options(kind: type | None, options: Mapping[str, Any]) -> tuple[Any, list[OptionFault]]:
    """The options object (None for a component without options, or where something is wrong), and all that is wrong."""
    known = options_of(kind)
    faults = []
    for key, value in options.items():
        if key in known or takes_any(kind):
            continue
        close = get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        accepted = f"options: {', '.join(known)}" if known else "it takes no options"
        told = _told(known, close[0] if close else key, value)
        faults.append(OptionFault(key, told, f"unknown option; {hint}{accepted}"))
    if kind is None:
        return None, faults
    given = {key: value for key, value in options.items() if key in known or takes_any(kind)}
    try:
        read = _adapter(kind).validate_python(given)
    except ValidationError as error:
        told = {key: _told(known, key, value) for key, value in given.items()}
        for item in error.errors(include_url=False):
            loc = ".".join(map(str, item["loc"]))
            faults.append(OptionFault(loc, told.get(str(item["loc"][0])) if loc else told, _message(item)))
    return (None if faults else read), faults


def _told(known: Mapping[str, Option], name: str, value: Any) -> Any:
    """What an error repeats of a value that was given for an option."""
    return value if name not in known or known[name].shown else type(value)


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _message(item: Any) -> str:
    if item["type"] == "missing":
        return REQUIRED
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.replace("Input should", "must").replace("a valid tuple", "a list")  # as YAML and flags write it
