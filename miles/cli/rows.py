"""A resolved configuration as rows: key, value, origin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from miles.config.components import components_of
from miles.config.faults import DEFAULT, Origin
from miles.config.leaves import SETS, Leaf, leaves
from miles.config.load import Resolved
from miles.kinds import KINDS
from miles.options import options_of


@dataclass(frozen=True)
class Row:
    """One value."""

    key: str
    value: Any
    """As JSON has it."""
    origin: Origin


def values_of(resolved: Resolved) -> list[Row]:
    """Every leaf in the order of the schema, options of components (their defaults too) below the components."""
    rows: list[Row] = []
    for leaf in leaves().values():
        for path, value in _instances(resolved, leaf):
            rows += _rows(resolved, leaf, path, value)
    return rows


def _instances(resolved: Resolved, leaf: Leaf) -> Iterator[tuple[str, Any]]:
    data = resolved.config.model_dump(mode="json")
    if leaf.path[:2] not in SETS:
        yield leaf.dotted, _at(data, leaf.path)
        return
    for item in data[leaf.path[0]]["sets"]:
        if leaf.path[3:] != ("name",):
            yield ".".join((*leaf.path[:2], item["name"], *leaf.path[3:])), _at(item, leaf.path[3:])


def _at(data: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        data = data[part]
    return data


def _rows(resolved: Resolved, leaf: Leaf, key: str, value: Any) -> Iterator[Row]:
    if leaf.shape == "value" or value is None or not value:
        yield Row(key, value, resolved.origin(key))
        return
    items = [(key, value)] if leaf.shape == "spec" else [(f"{key}.{i}", item) for i, item in enumerate(value)]
    for at, item in items:
        name_key = f"{at}.name" if leaf.shape == "spec" else at
        yield Row(at, item["name"], resolved.origin(name_key))
        if "weight" in item:
            yield Row(f"{at}.weight", item["weight"], resolved.origin(f"{at}.weight"))
        yield from _option_rows(resolved, leaf, at, item)


def _option_rows(resolved: Resolved, leaf: Leaf, at: str, item: dict[str, Any]) -> Iterator[Row]:
    kind = str(leaf.kind)
    declared = {}
    if item["name"] not in KINDS[kind].words:
        declared = options_of(resolved.registry.component(kind, item["name"]).options)
    for name in dict.fromkeys([*declared, *item["options"]]):
        if name in item["options"]:
            yield Row(f"{at}.{name}", item["options"][name], resolved.origin(f"{at}.options.{name}"))
        elif declared[name].default is not MISSING:
            yield Row(f"{at}.{name}", declared[name].default, DEFAULT)


def component_rows(resolved: Resolved) -> list[tuple[str, str, str, str]]:
    """(key, name, who offers it, options that were given) for everything that the configuration names."""
    rows = []
    for use in components_of(resolved.config):
        if use.name in KINDS[use.kind].words:
            rows.append((use.key, use.name, "miles", ""))
        else:
            plugin = resolved.registry.entry(use.kind, use.name).plugin
            given = ", ".join(f"{name}={json.dumps(value, default=str)}" for name, value in use.options.items())
            rows.append((use.key, use.name, f"{plugin.distribution} {plugin.version}".rstrip(), given))
    return rows
