"""Layers of settings, one put over the other; what comes out is what the schema validates."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import reduce
from typing import Any

from miles.config.base import Spec, as_weighted
from miles.config.faults import DEFAULT, Fault, Origin
from miles.config.leaves import FLAT, SETS, Leaf, Path, leaf_above, leaf_path, leaves, pattern
from miles.config.selection import Selection
from miles.config.settings import RESET, Setting

_OWN = ("path", "weight", "n_samples_per_prompt")
"""What an evaluation set never takes from a training set."""


class Tree:
    """Values and origins by path; later settings win."""

    def __init__(self, faults: list[Fault]):
        self.values: dict[Path, Any] = {}
        self.origins: dict[Path, Origin] = {}
        self.sets: dict[Path, list[str]] = {path: [] for path in sorted(SETS)}
        self.inheriting: list[str] = []
        self._faults = faults

    def put_all(self, settings: Iterable[Setting]) -> None:
        for setting in settings:
            self.put(setting)

    def put(self, setting: Setting) -> None:
        path = setting.path
        if setting.value is RESET:
            self._reset(path)
        elif path[:2] in SETS and len(path) == 3:
            self._declare(setting)
        elif path[:2] in SETS:
            for name in self._names(setting):
                self._put((*path[:2], name, *path[3:]), setting.value, setting.origin)
        else:
            self._put(path, setting.value, setting.origin)

    def inherit(self) -> None:
        """Give evaluation sets made by a flag what they do not say from the training set, as slime does."""
        names = self.sets["data", "sets"]
        source = "default" if "default" in names else names[0] if names else None
        if source is None:
            return
        origin = Origin("inherited", f"as data.sets.{source}")
        theirs = [path for path in self.values if path[:3] == ("data", "sets", source) and path[3] not in _OWN]
        for name in self.inheriting:
            own = {leaf_path(path) for path in self.values if path[:3] == ("eval", "sets", name)}
            for path in theirs:
                mine = ("eval", "sets", name, *path[3:])
                if leaf_path(mine) not in own:
                    self.values[mine], self.origins[mine] = self.values[path], origin

    def nested(self) -> dict[str, Any]:
        """As the schema takes it: specs as `{name, options}`, task sets as lists."""
        result: dict[str, Any] = {}
        for path, value in self.values.items():
            at = result
            for part in path[:-1]:
                at = at.setdefault(part, {})
            at[path[-1]] = value
        for path in dict.fromkeys(map(leaf_path, self.values)):
            leaf = leaves()[pattern(path)]
            if leaf.shape == "spec":
                holder = reduce(dict.__getitem__, path[:-1], result)
                holder[path[-1]] = _completed(holder[path[-1]], leaf.default)
        for path, names in self.sets.items():
            if names:
                below = result.setdefault(path[0], {})
                given = below.get(path[1], {})
                below[path[1]] = [{"name": name, **given.get(name, {})} for name in names]
        return result

    def origin(self, path: Path) -> Origin:
        """Of a value: its own, that of the leaf it is part of, or that of something below it."""
        start = len(leaf_path(path))
        for end in range(len(path), start - 1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        below = [origin for other, origin in self.origins.items() if other[: len(path)] == path]
        return below[-1] if below else DEFAULT

    # ------------------------------------------------------------------------------------------------------ inside

    def _put(self, path: Path, value: Any, origin: Origin) -> None:
        found = leaf_above(path)
        if found is None:
            return
        leaf, rest = found
        if isinstance(value, Selection):
            self._select(path, leaf, value, origin)
            return
        at = leaf_path(path)
        if leaf.shape == "spec" and rest == ("name",):
            self._rename(leaf, at, value)
        if rest and leaf.shape != "spec":
            value = self._edited(at, leaf, rest, value, origin)
            self.origins[path] = origin
            path = at
            origin = self.origins.get(at, origin)
        elif leaf.shape == "spec" and len(rest) > 2:
            value = _edit(self.values.get((*at, *rest[:2]), {}), rest[2:], value)
            path = (*at, *rest[:2])
        self.values[path], self.origins[path] = value, origin

    def _select(self, at: Path, leaf: Leaf, selection: Selection, origin: Origin) -> None:
        """Name a component or name it no more; what says so already stays, with its options and its origin."""
        if leaf.shape == "spec":
            default = leaf.default.name if leaf.default else None
            if selection.names(self.values.get((*at, "name"), default)) != selection.on:
                self._put((*at, "name"), selection.name if selection.on else default, origin)
            return
        before = _plain(self.values.get(at, leaf.default))
        items = selection.listed(leaf, before)
        if items is None:
            return
        self.values[at] = items
        if selection.on:
            self.origins.setdefault(at, origin)
            self.origins[*at, str(len(items) - 1)] = origin
        else:
            for path in [path for path in self.origins if path[: len(at)] == at]:
                del self.origins[path]
            self.origins[at] = origin

    def _rename(self, leaf: Leaf, at: Path, name: Any) -> None:
        """Options belong to a component: another name leaves those of the layers below behind."""
        before = self.values.get((*at, "name"), leaf.default.name if leaf.default else None)
        if before != name:
            for path in [path for path in self.values if path[: len(at) + 1] == (*at, "options")]:
                del self.values[path], self.origins[path]

    def _edited(self, at: Path, leaf: Leaf, rest: Path, value: Any, origin: Origin) -> Any:
        current = self.values.get(at, leaf.default)
        if leaf.shape == "rewards" and rest[0].isdigit():
            current = as_weighted(current)  # by position there is a place in a mapping of weights too
        try:
            return _edit(_plain(current), rest, value)
        except (IndexError, ValueError, TypeError):
            key = ".".join((*at, *rest))
            self._faults.append(Fault(key, f"{'.'.join(at)} has no such part: it is {current!r}", "", value, origin))
            return current

    def _reset(self, path: Path) -> None:
        for other in [other for other in self.values if other[:2] == path]:
            del self.values[other], self.origins[other]
        self.sets[path] = []

    def _declare(self, setting: Setting) -> None:
        where, name = setting.path[:2], setting.path[2]
        if name not in self.sets[where]:
            self.sets[where].append(name)
            self.origins[setting.path] = setting.origin
            if setting.value.get("inherit"):
                self.inheriting.append(name)

    def _names(self, setting: Setting) -> list[str]:
        """Which task sets a setting speaks of."""
        where, name = setting.path[:2], setting.path[2]
        names = self.sets[where]
        if name == "*":
            return list(names)
        if name == FLAT:
            return self._flat(setting, where, names)
        if name in names:
            return [name]
        if name.isdigit() and int(name) < len(names):
            return [names[int(name)]]
        if setting.path[3] == "path" and not name.isdigit():
            names.append(name)
            return [name]
        known = f"no such task set; there are {', '.join(names) or 'none'}"
        remedy = f"a new set begins with --{'.'.join((*where, name))}.path=FILE"
        for close in get_close_matches(name, names, n=1):
            remedy = f"did you mean {close}?"
        self._faults.append(Fault(".".join(setting.path), known, remedy, origin=setting.origin))
        return []

    def _flat(self, setting: Setting, where: Path, names: list[str]) -> list[str]:
        flag = str(setting.origin)
        if where == ("eval", "sets"):
            if not names:
                self._faults.append(Fault(flag, "there is no evaluation set", "give --eval-prompt-data NAME PATH"))
            return list(names)
        if "default" in names or not names:
            names[:] = names or ["default"]
            return ["default"]
        if len(names) == 1:
            return list(names)
        problem = f"which task set? data.sets has {', '.join(names)}, and none is called 'default'"
        self._faults.append(Fault(flag, problem, f"write --data.sets.{names[0]}.{'.'.join(setting.path[3:])}=..."))
        return []


def _completed(spec: dict[str, Any], default: Spec | None) -> dict[str, Any] | None:
    """A spec as the schema takes it; one with options only keeps the default's name."""
    if "name" not in spec:
        name, options = (default.name, default.options) if default else ("", {})
        return {"name": name, "options": {**options, **spec["options"]}}
    return None if spec["name"] is None and not spec.get("options") else spec


def _plain(value: Any) -> Any:
    """A tuple of specs, as the schema's defaults have them, as a list of mappings."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.model_dump() if hasattr(value, "model_dump") else value


def _edit(container: Any, rest: Path, value: Any) -> Any:
    """A copy of nested lists and mappings with one place changed."""
    if not rest:
        return value
    key, below = rest[0], rest[1:]
    if isinstance(container, list):
        index = int(key)
        items = list(container)
        items[index] = _edit(items[index], below, value)
        return items
    if isinstance(container, str):
        container = {"name": container}
    return {**container, key: _edit(container.get(key, {}), below, value)}
