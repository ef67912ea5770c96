"""Names become components, components become objects: `Registry`.

Whatever a config may name goes through here once, before the loop: the name is looked up (with a suggestion when
nobody offers it), its options are checked without importing anything heavy, and the built object is checked against
its kind's protocol.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from miles.catalog import MADE, provider
from miles.component import Component
from miles.conformance import check_result, construct, options_type
from miles.errors import ConfigError, MilesError, PluginConflictError, UnknownNameError
from miles.kinds import KINDS, Kind
from miles.options import OptionFault, read_options
from miles.plugins import PluginInfo, Plugins, Registration
from miles.targets import import_target

PYTHON = PluginInfo("(python)", "(given in Python)", "", "")


@dataclass(frozen=True)
class Entry:
    """A component that was found, and who offers it."""

    kind: str
    name: str
    component: Component
    plugin: PluginInfo
    live: Any = None
    """The object itself, when it was given in Python rather than registered by name."""

    def __str__(self) -> str:
        what = f"{KINDS[self.kind].singular} {self.name!r}"
        return what if self.live is not None else f"{what} of {self.plugin}"

    def load(self) -> Any:
        """What it names. Raises PluginLoadError."""
        return import_target(self.component.target, str(self)) if self.live is None else self.live


class Registry:
    """All components of a process, by kind and name."""

    def __init__(self, plugins: Plugins):
        self.plugins = plugins
        self._live: dict[tuple[str, str], Any] = {}
        self._sound: set[tuple[str, type]] = set()  # classes whose objects were checked: environments are built often
        self._offers: dict[str, dict[str, list[Registration]]] = {kind: {} for kind in KINDS}
        for offer in plugins.registrations:
            self._offers[offer.kind].setdefault(offer.name, []).append(offer)

    # ------------------------------------------------------------------------------------------------- looking up

    def add(self, kind: str, name: str, thing: Any) -> None:
        """Make a Python object available under a name, in this process only.

        Raises:
            PluginConflictError: another object has this name.
        """
        _kind(kind)
        if self._live.get((kind, name), thing) is not thing:
            raise PluginConflictError(f"two different objects were given as {kind} {name!r}")
        self._live[kind, name] = thing

    def names(self, kind: str) -> list[str]:
        """Every name of this kind that a config may use, sorted."""
        live = [name for other, name in self._live if other == kind]
        return sorted({*self._offers[_kind(kind).name], *live, *_kind(kind).words})

    def offers(self, kind: str) -> list[Registration]:
        """Everything registered under this kind, conflicting names included, sorted by name."""
        return [offer for name in sorted(self._offers[kind]) for offer in self._offers[kind][name]]

    def components(self) -> Iterator[Registration]:
        """Every component that a plugin registers: all but presets, in the order of the kinds."""
        return (offer for kind in KINDS.values() if kind.protocol is not None for offer in self.offers(kind.name))

    def conflicts(self) -> list[PluginConflictError]:
        """One error for each name that two plugins claim."""
        return [
            self._conflict(kind, name, offers)
            for kind, names in self._offers.items()
            for name, offers in sorted(names.items())
            if len(offers) > 1
        ]

    def entry(self, kind: str, name: str) -> Entry:
        """Who offers `name`: `name`, `distribution/name`, or `module:attribute`.

        Raises:
            UnknownNameError: nobody does.
            PluginConflictError: two plugins do.
        """
        spec = _kind(kind)
        if (kind, name) in self._live:
            thing = self._live[kind, name]
            target = name if ":" in name else f"{getattr(thing, '__module__', '?')}:{name}"
            return Entry(kind, name, Component(target, options=options_type(thing)), PYTHON, live=thing)
        if ":" in name and spec.protocol is not None:
            return self._from_module(kind, name)
        offer = self._offer(spec, name)
        return Entry(kind, name, offer.value, offer.plugin)

    def component(self, kind: str, name: str) -> Component:
        """The component called `name`. Errors as in `entry`."""
        return self.entry(kind, name).component

    def preset(self, name: str) -> tuple[Mapping[str, Any], PluginInfo]:
        """A preset's config overlay, and who ships it. Errors as in `entry`."""
        offer = self._offer(KINDS["presets"], name)
        return offer.value, offer.plugin

    def _offer(self, kind: Kind, name: str) -> Registration:
        distribution, _, bare = name.rpartition("/")
        offers = self._offers[kind.name].get(bare, [])
        if distribution:
            offers = [offer for offer in offers if offer.plugin.distribution == distribution]
        if not offers:
            raise UnknownNameError(self._unknown(kind, name))
        if len(offers) > 1:
            raise self._conflict(kind.name, name, offers)
        return offers[0]

    def _unknown(self, kind: Kind, name: str) -> str:
        lines = [f"no installed plugin offers the {kind.singular} {name!r}" if name else "has options and no `name`"]
        bare = name.rpartition("/")[2]
        known = self.names(kind.name)
        distribution = provider(kind.name, bare)
        presets = (
            self.names("presets") if kind.name == "advantage_estimators" else []
        )  # a preset may be named there too
        close = get_close_matches(bare, dict.fromkeys([*known, *presets]), n=2)
        if distribution in MADE:
            lines.append(f"{distribution} does: pip install {distribution}")
        elif distribution:
            lines.append(f"it is planned as {distribution}, which is not in this version")
        module, _, attribute = bare.rpartition(".")
        if kind.protocol is not None and attribute.isidentifier() and all(p.isidentifier() for p in module.split(".")):
            lines.append(f"a function or class of a module is written with a colon: {module}:{attribute}")
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        lines.append(f"{hint}installed: {', '.join(known) or 'none'}")
        lines += [f"presets that go in its place: {', '.join(presets)}"] if presets else []
        return "; ".join(lines)

    def _conflict(self, kind: str, name: str, offers: list[Registration]) -> PluginConflictError:
        claims = " and ".join(str(offer.plugin) for offer in offers)
        either = " or ".join(f"{offer.plugin.distribution}/{name}" for offer in offers)
        return PluginConflictError(f"the {KINDS[kind].singular} {name!r} is claimed by {claims}; write {either}")

    def _from_module(self, kind: str, name: str) -> Entry:
        plugin = PluginInfo(name, "(module path)", "", name)
        thing = import_target(name, f"{KINDS[kind].singular} {name!r}")
        return Entry(kind, name, Component(name, options=options_type(thing)), plugin, live=thing)

    # ----------------------------------------------------------------------------------------- checking, building

    def check(self, kind: str, name: str, options: Mapping[str, Any]) -> list[OptionFault]:
        """What is wrong with the options of a component; empty when nothing is. Imports no target."""
        if name in _kind(kind).words:
            return [OptionFault(key, value, f"{name!r} takes no options") for key, value in options.items()]
        return read_options(self.component(kind, name).options, options)[1]

    def build(self, kind: str, spec: Any, *, context: Any = None) -> Any:
        """The object that a spec names, as `miles.protocols` says components are called.

        Args:
            spec: anything with `name` and `options`.
            context: for kinds whose protocol names a context.

        Raises:
            ConfigError, PluginError: see `entry`.
            ConfigError: options are wrong; all of them in one error, before anything is imported.
            PluginLoadError: the target cannot be imported.
            HookError: it is not what its kind's protocol asks for.
        """
        if spec.name in _kind(kind).words:
            raise ConfigError(f"{KINDS[kind].keys[0]}: {spec.name!r} is a choice made by the core, not a component")
        entry = self.entry(kind, spec.name)
        options, faults = read_options(entry.component.options, spec.options)
        if faults:
            raise ConfigError(f"{KINDS[kind].singular} {spec.name!r}: " + "; ".join(map(str, faults)))
        thing = entry.load()
        try:
            built = construct(thing, options, context, str(entry), KINDS[kind])
        except MilesError:
            raise
        except Exception as error:
            error.add_note(f"while building {entry}")
            raise
        if (kind, type(built)) not in self._sound:
            check_result(built, KINDS[kind], str(entry))
            if inspect.isclass(thing):
                self._sound.add((kind, thing))
        return built


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise UnknownNameError(f"{name!r} is no kind of component; kinds: {', '.join(KINDS)}")
    return KINDS[name]
