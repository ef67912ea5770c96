"""Everything that can be wrong with plugins and components, found by loading and importing all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miles.config.faults import Fault, Origin
from miles.config.leaves import flag_table
from miles.config.selection import SELECTS
from miles.config.settings import Flattener
from miles.errors import MilesError
from miles.kinds import KINDS
from miles.options import options_of
from miles.plugins import Plugins, Registration
from miles.registry import Registry
from miles.targets import import_target


@dataclass(frozen=True)
class Examined:
    """One thing that a plugin offers, and what is wrong with it."""

    kind: str
    name: str
    plugin: str
    """Name, distribution and version."""
    faults: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind].singular} {self.name!r} of {self.plugin}"


def diagnose(plugins: Plugins) -> list[str]:
    """One line for each fault: of loading, of names, of presets, of flags and options, of targets."""
    report = [str(fault) for fault in plugins.faults]
    report += [str(conflict) for conflict in Registry(plugins).conflicts()]
    return report + [f"{one.title}: {fault}" for one in examined(plugins) for fault in one.faults]


def examined(plugins: Plugins) -> Iterator[Examined]:
    """Everything that is registered, each target imported."""
    registry = Registry(plugins)
    for kind, about in KINDS.items():
        for offer in registry.offers(kind):
            one = Examined(kind, offer.name, str(offer.plugin), ())
            if about.protocol is None:
                faults = [str(fault) for fault in _preset_faults(offer)]
            else:
                faults = list(_component_faults(offer, one.title))
            yield Examined(kind, offer.name, str(offer.plugin), tuple(faults))


def _preset_faults(offer: Registration) -> list[Fault]:
    faults: list[Fault] = []
    flattener = Flattener(faults, lambda kind, thing: "")
    list(flattener.mapping(offer.value, Origin("preset", f"preset {offer.name!r}")))
    return faults


def _component_faults(offer: Registration, who: str) -> Iterator[str]:
    component = offer.value
    try:
        options = options_of(component.options)
    except MilesError as error:
        yield str(error)
        return
    for flag, option in component.flags.items():
        if flag in flag_table():
            yield f"its flag {flag} is already that of {flag_table()[flag].dotted}"
        if option not in (SELECTS, *options):
            yield f"its flag {flag} stands for {option!r}, which is none of its options"
    try:
        import_target(component.target, who)
    except MilesError as error:
        yield str(error).removeprefix(f"{who}: ")
