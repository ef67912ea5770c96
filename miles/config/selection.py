"""Flags that select the component which declares them: `--use-tis` is `--is-correction tis`.

Where one component stands, the flag names it and leaves its options as they are if it stands there already; in a list
it is added, once. `--no-use-tis` is its contrary: the default comes back, or the list is left without it. A flag with a
value, `--custom-rm-path my.reward`, selects its component besides where the component `provides` the flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miles.config.faults import Fault, Origin
from miles.config.leaves import Leaf, leaf_above, leaves, pattern
from miles.config.settings import Setting
from miles.config.values import from_text
from miles.kinds import KINDS
from miles.options import options_of
from miles.plugins import Registration
from miles.registry import Registry

SELECTS = ""
"""As the option that a flag of a component stands for: the component itself."""


@dataclass(frozen=True)
class Selection:
    """As the value of a place where components are named: this one, or, when not `on`, any but this one."""

    name: str
    on: bool = True

    def names(self, name: Any) -> bool:
        """Whether a name, written with or without its distribution, is that of this component."""
        return str(name).rpartition("/")[2] == self.name

    def listed(self, leaf: Leaf, value: Any) -> Any:
        """A list of components with this one in it, or without it; None where it says so already, or is no list."""
        items = leaf.items(value)
        if items is None:
            return None
        others = [item for item in items if not self.names(item.get("name") if isinstance(item, dict) else item)]
        if self.on:
            return [*items, self.name] if len(others) == len(items) else None
        return others if len(others) < len(items) else None


def place_of(offer: Registration) -> Leaf:
    """The setting that names a component: the first of its kind, or the one that it provides."""
    keys = KINDS[offer.kind].keys
    key = next((key for key in keys if key in offer.value.provides), keys[0])
    return leaves()[tuple(key.split("."))]


def selects(offer: Registration, flag: str) -> bool:
    """Whether a flag of a component selects it: as its switch, or beside the option that it sets."""
    return offer.value.flags[flag] == SELECTS or flag in offer.value.provides


def how_to_select(offer: Registration) -> str:
    """What to do for a component to be selected, as an error says it."""
    place = place_of(offer)
    told = f"set {place.dotted} to {offer.name}" if place.shape == "spec" else f"add {offer.name} to {place.dotted}"
    flag = next((flag for flag in offer.value.flags if selects(offer, flag)), None)
    return f"{told} ({flag})" if flag else told


@dataclass
class DeclaredFlag:
    """A flag that components declare."""

    annotation: Any
    """Type of the option that it sets; bool of a switch."""
    selects: Registration | None = None
    """The component that it selects."""
    is_switch: bool = False
    """It selects, and sets no option."""

    def selection(self, flag: str, value: Any, origin: Origin, faults: list[Fault]) -> list[Setting]:
        """What it selects when it is given a value; a fault where that is no switch's."""
        if self.selects is None:
            return []
        on = True if not self.is_switch else from_text(value, bool) if isinstance(value, str) else value
        if isinstance(on, bool):
            return [Setting(place_of(self.selects).flat, Selection(self.selects.name, on), origin)]
        faults.append(Fault(flag, "must be true or false", f"{flag}, or --no-{flag[2:]}", value, origin))
        return []


def component_flags(registry: Registry) -> dict[str, DeclaredFlag]:
    """Flag -> what it does, over all components, whichever is selected."""
    flags: dict[str, DeclaredFlag] = {}
    for offer in registry.components():
        options = options_of(offer.value.options)
        for flag, option in offer.value.flags.items():
            kind = options[option].annotation if option in options else bool if option == SELECTS else str
            declared = flags.setdefault(flag, DeclaredFlag(bool if kind == bool | None else kind))
            if selects(offer, flag):
                declared.selects, declared.is_switch = offer, option == SELECTS
    return flags


def in_order(settings: Sequence[Setting]) -> list[Setting]:
    """One layer's settings, so that the order of a command line is no matter: a component's name before its options,
    which another name would take away, and a list before what is added to it."""
    return sorted(settings, key=_rank)


def _rank(setting: Setting) -> int:
    found = leaf_above(setting.path)
    in_list = found is not None and found[0].shape != "spec"
    if isinstance(setting.value, Selection):
        return 2 if in_list else 0
    return int(found is not None and not in_list and found[1][:1] == ("options",))


def contradictions(settings: Sequence[Setting]) -> Iterator[Fault]:
    """Where one layer selects a component by a flag and names another for the same place, or selects two."""
    named = {s.path: (s.value, s.origin) for s in settings if not isinstance(s.value, Selection)}
    for setting in settings:
        chosen, path = setting.value, setting.path
        if not isinstance(chosen, Selection) or not chosen.on or leaves()[pattern(path)].shape != "spec":
            continue
        other, where = named.setdefault((*path, "name"), (chosen.name, setting.origin))
        if not chosen.names(other):
            problem = f"selects {chosen.name!r}, but {leaves()[pattern(path)].dotted} is {other!r} ({where})"
            yield Fault(str(setting.origin), problem, "give one of the two", origin=setting.origin)
