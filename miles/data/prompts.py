"""What a row of a prompt file means: `read_prompt` makes a `Prompt` of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.config import Keys, TaskSet
from miles.errors import DataError
from miles.types import Message, Prompt

ABSENT = object()


def read_prompt(row: Mapping[str, Any], task_set: TaskSet, number: int, where: str, nullable: bool = False) -> Prompt:
    """The prompt that a row holds, not yet rendered to tokens.

    Args:
        row: column name -> value.
        task_set: its keys say which columns mean what.
        number: the row's place in its file, for the prompt's id.
        where: the row's origin, for error messages.
        nullable: nulls inside messages and tools stand for absent fields (Parquet structs).

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    keys = task_set.keys
    text, messages = _input(row, task_set, where, nullable)
    tools = _decoded(_column(row, "tools", keys, where), list, keys.tools, where)
    images = _column(row, "images", keys, where)
    return Prompt(
        id=f"{task_set.name}:{number}",
        task_set=task_set.name,
        text=text,
        messages=messages,
        tools=(without_nulls(tools) if nullable else tools) or None,
        images=images if images is None or isinstance(images, list) else [images],
        label=_column(row, "label", keys, where),
        metadata=_decoded(_column(row, "metadata", keys, where), dict, keys.metadata, where) or {},
    )


def without_nulls(value: Any) -> Any:
    """The same with every null field of every mapping left out."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _column(row: Mapping[str, Any], field: str, keys: Keys, where: str) -> Any:
    """An optional column's value, or None. Only a column that somebody named must be there."""
    key = getattr(keys, field)
    if key is None or key in row:
        return row.get(key)
    if key != Keys.model_fields[field].default:
        raise DataError(f"{where}: no key {key!r}, which keys.{field} names; {_present(row)}")
    return None


def _present(row: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no keys'}"


def _input(
    row: Mapping[str, Any], task_set: TaskSet, where: str, nullable: bool
) -> tuple[str | None, list[Message] | None]:
    """Text or messages, exactly one of them. A JSON string that holds messages counts as messages."""
    key = task_set.keys.input
    value = row.get(key, ABSENT)
    if value is ABSENT and task_set.environment is not None:
        return None, []
    if value is ABSENT:
        raise DataError(
            f"{where}: no key {key!r}, which shall hold the prompt; {_present(row)}. "
            "Name the right one with keys.input (--input-key)"
        )
    if isinstance(value, str) and value:
        messages = _messages_in(value)
        if messages is None and task_set.apply_chat_template:
            messages = [Message(role="user", content=value)]
        return (value, None) if messages is None else (None, messages)
    if is_conversation(value):
        return None, without_nulls(value) if nullable else value
    raise DataError(f"{where}: {key!r} must be text (not empty) or a list of messages with a role, not {_shown(value)}")


def _messages_in(text: str) -> list[Message] | None:
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if is_conversation(value) else None


def is_conversation(value: Any) -> bool:
    """Whether this is a non-empty list of chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value)
    )


def _decoded(value: Any, kind: type, key: str, where: str) -> Any:
    """A value of a kind, or a JSON string of one, or nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise DataError(f"{where}: {key!r} is text but not JSON: {error}") from error
    if value is None or isinstance(value, kind):
        return value
    what = "a mapping" if kind is dict else "a list"
    raise DataError(f"{where}: {key!r} must be {what} or a JSON string of one, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
