"""Everything that can be wrong with what is installed, found by loading and importing all of it."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.faults import Fault, Origin
from miles.config.leaves import flag_table
from miles.config.settings import Flattener, fixed_origin
from miles.errors import MilesError
from miles.kinds import KINDS
from miles.options import options_of
from miles.plugins import Plugins, Registration
from miles.registry import Registry
from miles.targets import import_target


def diagnose(plugins: Plugins) -> list[str]:
    """One line for each fault: of loading, of names, of presets, of flags and options, of targets."""
    registry = Registry(plugins)
    report = [str(fault) for fault in plugins.faults]
    report += [str(conflict) for conflict in registry.conflicts()]
    for kind, about in KINDS.items():
        for offer in registry.offers(kind):
            who = f"{about.singular} {offer.name!r} of {offer.plugin}"
            if about.protocol is None:
                report += [f"{who}: {fault}" for fault in _preset_faults(offer)]
            else:
                report += [f"{who}: {fault}" for fault in _component_faults(offer, who)]
    return report


def _preset_faults(offer: Registration) -> list[Fault]:
    faults: list[Fault] = []
    flattener = Flattener(faults, lambda kind, thing: "")
    list(flattener.mapping(offer.value, fixed_origin(Origin("preset", f"preset {offer.name!r}"))))
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
        if option not in options:
            yield f"its flag {flag} stands for {option!r}, which is none of its options"
    try:
        import_target(component.target, who)
    except MilesError as error:
        yield str(error).removeprefix(f"{who}: ")
