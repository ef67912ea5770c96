"""YAML whose mappings remember the line of every key, so that an error can point at it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from miles.errors import ConfigError


class Located(dict):
    """A mapping from a file. `lines[key]` is the line, from 1, where the key stands."""

    def __init__(self, items: Mapping[Any, Any], lines: Mapping[Any, int]):
        super().__init__(items)
        self.lines = lines


class Loader(yaml.SafeLoader):
    """Safe, refuses duplicate keys, and reads `1e-6` as a number as YAML 1.2 does."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> Located:
    own = [key_node for key_node, _ in node.value if key_node.tag != "tag:yaml.org,2002:merge"]
    items = loader.construct_mapping(node, deep=True)  # what is merged in stands in the node from here on
    seen: dict[Any, int] = {}
    for key_node in own:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands here and in line {seen[key]}", key_node.start_mark
            )
        seen[key] = key_node.start_mark.line + 1
    lines = {loader.construct_object(key_node, deep=True): key_node.start_mark.line + 1 for key_node, _ in node.value}
    return Located(items, lines)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> Located:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the config file {path} cannot be read: {reason}") from error
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if data is None:
        return Located({}, {})
    if not isinstance(data, Located):
        raise ConfigError(f"{path} must hold a mapping of sections (run, model, data, ...), not {type(data).__name__}")
    return data
