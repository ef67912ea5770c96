"""From nested mappings (YAML files, presets, Python) to settings: one path, one value, one origin each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from miles.config.base import RewardSpec, Spec
from miles.config.faults import Fault, Origin
from miles.config.leaves import SETS, Leaf, Path, children, flag_table, leaf_above, leaf_path, leaves

RESET = object()
"""As the value of a list of task sets: forget the sets of the layers below."""

Named = Callable[[str, Any], str]
"""(kind, object) -> the name under which an object given in Python was registered."""


@dataclass(frozen=True)
class Setting:
    """A value for a path. Component specs are split: the name at `(..., "name")`, options at `(..., "options", x)`."""

    path: Path
    value: Any
    origin: Origin


class Flattener:
    """Turns mappings into settings, collecting what is wrong with them."""

    def __init__(self, faults: list[Fault], named: Named):
        self.faults = faults
        self._named = named

    def mapping(self, mapping: Mapping, origin: Origin, at: Path = ()) -> Iterator[Setting]:
        """Settings of a mapping that stands at path `at`."""
        for key, value in mapping.items():
            yield from self.value((*at, str(key)), value, origin.of(mapping, key))

    def value(self, path: Path, value: Any, origin: Origin) -> Iterator[Setting]:
        """Settings of whatever stands at a path: section, list of task sets, leaf, or something below a leaf."""
        found = leaf_above(path)
        if path in SETS:
            yield from self._sets(path, value, origin)
        elif found is not None:
            leaf, rest = found
            yield from self._leaf(leaf, leaf_path(path), rest, value, origin)
        elif children(path):
            if isinstance(value, Mapping):
                yield from self.mapping(value, origin, path)
            elif value is not None:
                self._fault(path, value, origin, "is a section, not a value", f"set one of {', '.join(children(path))}")
        else:
            self.unknown(path, value, origin)

    def unknown(self, path: Path, value: Any, origin: Origin) -> None:
        """Report a path that the schema does not have."""
        parent = path[:-1]
        while parent and not children(parent) and parent not in SETS:
            parent = parent[:-1]
        known = children(parent)
        wrong = path[len(parent)]
        close = get_close_matches(wrong, known, n=1)
        flag = flag_table().get(f"--{path[-1].replace('_', '-')}")
        if flag is not None and flag.path[-1] == path[-1]:
            remedy = f"did you mean {flag.dotted}?"
        elif close:
            remedy = f"did you mean {'.'.join((*parent, close[0]))}?"
        else:
            elsewhere = get_close_matches(path[-1], {leaf.path[-1]: leaf for leaf in leaves().values()}, n=1)
            place = next((leaf.dotted for leaf in leaves().values() if elsewhere and leaf.path[-1] == elsewhere[0]), "")
            remedy = f"did you mean {place}?" if place else f"known here: {', '.join(known)}"
        self._fault(path, value, origin, "unknown key", remedy)

    def _sets(self, path: Path, value: Any, origin: Origin) -> Iterator[Setting]:
        if isinstance(value, Mapping):
            items = [(str(name), item or {}, origin.of(value, name)) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            yield Setting(path, RESET, origin)
            items = []
            for item in value:
                name = item.get("name", "default") if isinstance(item, Mapping) else "?"
                items.append((str(name), item, origin.of(item, "name")))
        else:
            self._fault(path, value, origin, "must be a list of task sets, or a mapping from their names")
            return
        seen: set[str] = set()
        for name, item, place in items:
            if not isinstance(item, Mapping):
                self._fault(path, item, place, "a task set is a mapping", "write {name: ..., path: ...}")
            elif name in seen:
                self._fault(path, name, place, "two task sets have this name", "give each a `name` of its own")
            else:
                seen.add(name)
                yield Setting((*path, name), {}, place)
                for key, below in item.items():
                    if key != "name":
                        yield from self.value((*path, name, str(key)), below, origin.of(item, key))

    def _leaf(self, leaf: Leaf, path: Path, rest: Path, value: Any, origin: Origin) -> Iterator[Setting]:
        if leaf.kind is not None and not rest:
            value = self._by_name(leaf.kind, value)
        if leaf.shape != "spec":
            yield Setting((*path, *rest), value, origin)
        elif rest:
            yield from self._spec_key(path, rest, value, origin)
        elif isinstance(value, Mapping):
            for key, below in value.items():
                yield from self._spec_key(path, (str(key),), below, origin.of(value, key))
        else:
            yield Setting((*path, "name"), value, origin)

    def _spec_key(self, path: Path, rest: Path, value: Any, origin: Origin) -> Iterator[Setting]:
        """One key of a spec: `name`, `options` (a mapping), or an option, written with or without `options.`."""
        if rest == ("options",) and isinstance(value, Mapping):
            for key, below in value.items():
                yield Setting((*path, "options", str(key)), below, origin.of(value, key))
        elif rest == ("options",):
            if value is not None:
                self._fault((*path, *rest), value, origin, "must be a mapping from options to their values")
        else:
            yield Setting((*path, *(rest if rest[0] in ("name", "options") else ("options", *rest))), value, origin)

    def _by_name(self, kind: str, value: Any) -> Any:
        """What names components, with the names of objects that were given in Python in their places."""
        if isinstance(value, list | tuple):
            return [self._by_name(kind, item) for item in value]
        if isinstance(value, Spec | RewardSpec):
            return value.model_dump()
        if value is None or isinstance(value, str | int | float | Mapping):
            return value
        return self._named(kind, value)

    def _fault(self, path: Path, value: Any, origin: Origin, problem: str, remedy: str = "") -> None:
        self.faults.append(Fault(".".join(path), problem, remedy, value, origin))
