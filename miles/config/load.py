"""From files, flags and Python to one valid configuration in which every value knows where it came from.

Precedence, lowest first: the schema's defaults, YAML files in order, the command line, Python. A preset lies right
below the layer that names it: under the settings of a file that names it, over all files when the command line does.
Nothing stops at the first mistake: what is wrong anywhere is collected and raised as one report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import ValidationError

from miles.config.arguments import ComponentFlag, engine_of, read_arguments
from miles.config.checks import check
from miles.config.components import Use, components_of, read_texts, uses_in
from miles.config.faults import DEFAULT, ConfigFaults, Fault, Origin
from miles.config.leaves import Path, children, flag_table, leaf_above, leaf_path
from miles.config.replay import REPLAY, without_engines
from miles.config.schema import Config
from miles.config.selection import component_flags, contradictions, how_to_select, in_order
from miles.config.settings import Flattener, Setting
from miles.config.tree import Tree
from miles.config.upstream import known_name
from miles.config.yaml_file import read_yaml
from miles.errors import ConfigError, MilesError
from miles.kinds import KINDS
from miles.options import REQUIRED
from miles.plugins import Plugins, load_plugins
from miles.registry import Registry

Purpose = Literal["train", "rollout", "eval", "show"]
Source = str | FilePath | Mapping[str, Any]
_PYTHON = Origin("python", "given in Python")
_PRESET = ("algorithm", "preset")
_ESTIMATOR = ("algorithm", "advantage_estimator", "name")


@dataclass(frozen=True)
class Resolved:
    """A valid configuration and where its values came from."""

    config: Config
    origins: Mapping[str, Origin]
    """Dotted path -> origin, for everything that is not a default. Task sets stand under their names."""
    registry: Registry
    """Where its names become objects; knows the objects that were given in Python."""

    def origin(self, key: str) -> Origin:
        """Where the value at a dotted path came from."""
        path = tuple(key.split("."))
        for end in range(len(path), len(leaf_path(path)) - 1, -1):
            at = ".".join(path[:end])
            found = self.origins.get(at) or self.origins.get(f"{at}.name")
            if found is not None:
                return found
        return DEFAULT


def resolve(
    files: Sequence[Source] = (),
    arguments: Sequence[str] = (),
    plugins: Plugins | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    registry: Registry | None = None,
    purpose: Purpose = "train",
) -> Resolved:
    """Put the layers over each other and check everything that can be checked before anything is built.

    Args:
        files: YAML files, or mappings of the same form, lowest precedence first.
        arguments: words of a command line after the files: flags and `--section.key=value`.
        plugins: what `load_plugins` returned; loaded here when not given.
        overrides: from Python, by dotted path, section or flag name (`num_rollout`, `reward`). Where a component is
            named, an object (a function, a class, an instance) may stand instead.
        registry: to be used instead of a new one on `plugins`.
        purpose: what the configuration must be sufficient for.

    Raises:
        ConfigError: with all faults, each with key, value, origin and remedy.
        PluginError: a plugin is broken.
    """
    if registry is None:
        registry = Registry(plugins if plugins is not None else load_plugins(*plugin_wishes(files, arguments)))
    return _Resolution(registry, purpose).run(files, arguments, overrides or {})


def plugin_wishes(files: Sequence[Source], arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(blocked, required) plugins of a configuration, read before plugins are loaded."""
    faults: list[Fault] = []
    flattener = Flattener(faults, lambda kind, thing: "")
    tree = Tree(faults)
    for source in files:
        mapping, origin = _source(source)
        if isinstance(mapping.get("plugins"), Mapping):
            tree.put_all(flattener.mapping({"plugins": mapping["plugins"]}, origin))

    def wished(key: str) -> list[str]:
        wish = tree.values.get(("plugins", key))
        named = [wish] if isinstance(wish, str) else wish if isinstance(wish, list | tuple) else ()
        return [*map(str, named), *_words_after(f"--plugins-{key}", arguments)]

    return wished("block"), wished("require")


def _words_after(flag: str, arguments: Sequence[str]) -> list[str]:
    words: list[str] = []
    taking = False
    for word in arguments:
        if word.startswith("--"):
            taking = word == flag
            if word.startswith(f"{flag}="):
                words += word.partition("=")[2].split(",")
        elif taking:
            words += word.split(",")
    return words


def _source(source: Source) -> tuple[Mapping[str, Any], Origin]:
    if isinstance(source, Mapping):
        return source, _PYTHON
    return read_yaml(source), Origin("file", str(source))


class _Resolution:
    """One call of `resolve`: the faults it collects, and the steps."""

    def __init__(self, registry: Registry, purpose: Purpose):
        self.registry = registry
        self.purpose = purpose
        self.faults: list[Fault] = []
        self.flattener = Flattener(self.faults, self._name_object)

    def run(self, files: Sequence[Source], arguments: Sequence[str], overrides: Mapping[str, Any]) -> Resolved:
        layers = [self._file(source) for source in files]
        read = read_arguments(arguments, self.registry, self.flattener)
        given, flags = self._python(overrides)
        layers += [self._layer(read.settings), self._layer(given)]
        tree = Tree(self.faults)
        for layer in without_engines(self._with_preset(layers), self.purpose):
            tree.put_all(layer)
        tree.inherit()
        for flag, value, origin in (*read.component_flags, *flags):
            if tree.values.get(REPLAY) is None or not engine_of(flag, self.registry):
                self._component_flag(tree, flag, value, origin)
        nested = tree.nested()
        self._components(tree, nested)
        config = self._validated(tree, nested)
        if config is not None:
            self.faults += check(config, components_of(config), self.registry, tree.origin, self.purpose)
        origins = {".".join(path): origin for path, origin in tree.origins.items()}
        resolved = Resolved(config, origins, self.registry) if config is not None else None
        if resolved is None or self.faults:
            raise ConfigFaults(self.faults, resolved)
        return resolved

    # -------------------------------------------------------------------------------------------------------- layers

    def _file(self, source: Source) -> list[Setting]:
        try:
            mapping, origin = _source(source)
        except ConfigError as error:
            self.faults.append(Fault(str(source), str(error)))
            return []
        return in_order(list(self.flattener.mapping(mapping, origin)))

    def _layer(self, settings: list[Setting]) -> list[Setting]:
        self.faults += contradictions(settings)
        return in_order(settings)

    def _python(self, overrides: Mapping[str, Any]) -> tuple[list[Setting], list[ComponentFlag]]:
        """Settings, and flags of components, from names that are paths, sections, or flags without their dashes."""
        settings: list[Setting] = []
        flags: list[ComponentFlag] = []
        declarations = component_flags(self.registry)
        for key, value in overrides.items():
            origin = Origin("python", f"{key}, given in Python")
            flag = "" if "." in key or key in children(()) else f"--{key.replace('_', '-')}"
            if leaf := flag_table().get(flag):
                settings += self.flattener.value(leaf.flat, value, origin)
            elif declared := declarations.get(flag):
                settings += declared.selection(flag, value, origin, self.faults)
                if not declared.is_switch:
                    flags.append((flag, value, _PYTHON))
            else:
                settings += self.flattener.value(tuple(key.split(".")), value, _PYTHON)
        return settings, flags

    def _with_preset(self, layers: list[list[Setting]]) -> list[list[Setting]]:
        """The layers with the overlay of the preset that is asked for below the one that asks for it, and without a
        preset's name among estimators."""
        chosen = {s.path: (s, at) for at, layer in enumerate(layers) for s in layer if s.path in (_PRESET, _ESTIMATOR)}
        named, at = chosen.get(_PRESET, (None, 0))
        estimator, place = chosen.get(_ESTIMATOR, (None, 0))
        if estimator is not None and self._only_a_preset(estimator.value):
            layers = [[s for s in layer if s.path != _ESTIMATOR] for layer in layers]
            if named is None or named.value is None:
                named, at = Setting(_PRESET, estimator.value, estimator.origin), place
                layers[at].append(named)
            elif named.value != estimator.value:
                problem = f"is a preset, but algorithm.preset is {named.value!r} ({named.origin})"
                self._fault(_ESTIMATOR[:2], problem, "give one of the two", estimator.value, estimator.origin)
        if named is None or not isinstance(named.value, str):
            return layers
        try:
            overlay, plugin = self.registry.preset(named.value)
        except MilesError as error:
            self._fault(_PRESET, str(error), "", named.value, named.origin)
            return layers
        origin = Origin("preset", f"preset {named.value!r} of {plugin.distribution} {plugin.version}")
        return [*layers[:at], list(self.flattener.mapping(overlay, origin)), *layers[at:]]

    def _only_a_preset(self, name: Any) -> bool:
        estimators, presets = self.registry.names("advantage_estimators"), self.registry.names("presets")
        bare = str(name).rpartition("/")[2]
        return isinstance(name, str) and bare not in estimators and bare in presets

    # ----------------------------------------------------------------------------------------------------- components

    def _name_object(self, kind: str, thing: Any) -> str:
        """Register an object given in Python under the path from which it could be imported."""
        owner = thing if hasattr(thing, "__qualname__") else type(thing)
        name = base = f"{owner.__module__}:{owner.__qualname__}"
        for count in range(2, 1000):
            try:
                self.registry.add(kind, name, thing)
                return name
            except MilesError:
                name = f"{base}#{count}"
        raise ConfigError(f"too many different objects called {base}")

    def _component_flag(self, tree: Tree, flag: str, value: Any, origin: Origin) -> None:
        """Set the option that a flag stands for, in every selected component that declares it."""
        options = [(use, self._option_of(use.kind, use.name, flag)) for use, _ in uses_in(tree.nested())]
        places = [(*use.path, "options", option) for use, option in options if option is not None]
        tree.put_all(Setting(place, value, origin) for place in places)
        if not places:
            self._unselected(flag, origin)

    def _option_of(self, kind: str, name: str, flag: str) -> str | None:
        try:
            declared = self.registry.component(kind, name).flags
        except MilesError:
            return None  # `auto`, `none`, or a name at fault, which is reported when options are checked
        if flag in declared:
            return declared[flag]
        engine = engine_of(flag, self.registry) if kind == "rollout_engines" else None
        return engine[1] if engine and engine[0] == name.rpartition("/")[2] else None

    def _unselected(self, flag: str, origin: Origin) -> None:
        owners = [offer for offer in self.registry.components() if flag in offer.value.flags]
        if owners:
            named = [f"{KINDS[own.kind].singular} {own.name!r} of {own.plugin.distribution}" for own in owners]
            whose, remedy = f"belongs to {' or '.join(named)}", ", or ".join(map(how_to_select, owners))
        elif engine := engine_of(flag, self.registry):
            whose, remedy = f"goes to the rollout engine {engine[0]!r}", f"--rollout-engine {engine[0]}"
        else:
            return
        problem = f"{whose}, which is not selected"
        self.faults.append(Fault(flag, problem, f"{remedy}, or leave the flag out", origin=origin))

    def _components(self, tree: Tree, nested: dict[str, Any]) -> None:
        """Names and options of everything that is named; values typed on the command line get their types."""
        for use, options in uses_in(nested):
            try:
                words = KINDS[use.kind].words
                component = None if use.name in words else self.registry.component(use.kind, use.name)
                read_texts(options, component.options if component else None)
                faults = self.registry.check(use.kind, use.name, options)
            except MilesError as error:
                self._unknown_name(use, str(error), tree.origin((*use.path, "name") if use.name else use.path))
                continue
            for fault in faults:
                path = (*use.path, *(fault.key.split(".") if fault.key else ()))
                place = tree.origin((*use.path, "options", *fault.key.split(".")) if fault.key else use.path)
                flags = component.flags if component and fault.problem == REQUIRED else {}
                remedy = next((flag for flag, option in flags.items() if option == fault.key), "")
                problem = f"{KINDS[use.kind].singular} {use.name!r}: {fault.problem}"
                self._fault(path, problem, remedy, fault.value, place)

    def _unknown_name(self, use: Use, problem: str, origin: Origin) -> None:
        answer, remedy = known_name(use.kind, use.name), ""
        if answer is not None:
            replaced = answer.fate == "replaced"
            problem, remedy = (problem, answer.text) if replaced else (answer.problem, "name another component")
        self._fault(use.path, problem, remedy, use.name, origin)

    # ------------------------------------------------------------------------------------------------------- the whole

    def _validated(self, tree: Tree, nested: dict[str, Any]) -> Config | None:
        try:
            return Config.model_validate(nested)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._schema_fault(tree, item)
            return None

    def _schema_fault(self, tree: Tree, item: Any) -> None:
        path: Path = tuple(str(part) for part in item["loc"])
        if path[:2] in tree.sets and len(path) > 2:
            path = (*path[:2], tree.sets[path[:2]][int(path[2])], *path[3:])
        found = leaf_above(path)
        if found and found[0].shape == "value":
            path = leaf_path(path)
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
        meaning = found[0].help if found else ""
        self.faults.append(Fault(".".join(path), message, "", item["input"], tree.origin(path), meaning))

    def _fault(self, path: Path, problem: str, remedy: str = "", value: Any = None, origin: Origin = DEFAULT) -> None:
        self.faults.append(Fault(".".join(path), problem, remedy, value, origin))
