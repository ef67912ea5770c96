"""Find plugins, load them one by one, and say precisely what is wrong with those that cannot be loaded.

A plugin is a module named by an entry point of group `miles`. Each is imported on its own, so that one broken plugin
never hides the others; every fault carries the plugin, its distribution and its version. Names become components in
`miles.registry`; here they are only collected, with who offered them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from itertools import repeat
from traceback import walk_tb
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from miles import hookspecs
from miles.api import API_VERSION, Component
from miles.errors import HookError, PluginConflictError, PluginError, PluginLoadError
from miles.log import logger

GROUP = "miles"
REGISTERS = "miles_register_"
_MARK = f"{hookspecs.PROJECT}_impl"


@dataclass(frozen=True)
class PluginInfo:
    """Where a plugin comes from."""

    name: str
    distribution: str
    version: str
    module: str
    api: int | None = None
    """The API version it says it was made for; None when it says nothing."""

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class Registration:
    """One name that one plugin offers."""

    kind: str
    name: str
    value: Any
    """A `Component`; for presets, a config overlay."""
    plugin: PluginInfo


@dataclass
class Plugins:
    """The plugins of this process. Made by `load_plugins`."""

    manager: pluggy.PluginManager
    infos: dict[str, PluginInfo] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    faults: list[PluginError] = field(default_factory=list)
    registrations: list[Registration] = field(default_factory=list)

    @property
    def hook(self) -> Hooks:
        """Lifecycle hooks: `plugins.hook.miles_on_run_start(run=run)`."""
        return Hooks(self)

    def provenance(self) -> list[dict[str, Any]]:
        """What `plugins.json` of a run says: one entry a plugin, by name."""
        return [{**vars(info), "components": self._names(info)} for _, info in sorted(self.infos.items())]

    def verify(self, expected: Sequence[Mapping[str, Any]]) -> None:
        """Compare with the provenance of another process, such as the driver's in a worker.

        Raises:
            PluginConflictError: listing every difference.
        """
        differences = compare_provenance(expected, self.provenance())
        if differences:
            raise PluginConflictError(
                "this process has other plugins than the one that started the run:\n  "
                + "\n  ".join(differences)
                + "\nInstall the same distributions where workers run. A plugin given in Python cannot follow there."
            )

    def raise_faults(self) -> None:
        """Raise what was wrong while loading, everything in one error."""
        if not self.faults:
            return
        kinds = {type(fault) for fault in self.faults}
        error = kinds.pop() if len(kinds) == 1 else PluginError
        message = "\n".join(str(fault) for fault in self.faults)
        raise error(message) from self.faults[0].__cause__

    def _names(self, info: PluginInfo) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for registration in self.registrations:
            if registration.plugin == info:
                names.setdefault(registration.kind, []).append(registration.name)
        return {kind: sorted(those) for kind, those in sorted(names.items())}


class Hooks:
    """Calls hooks through pluggy; an exception is noted with the plugin whose function raised it."""

    def __init__(self, plugins: Plugins):
        self._plugins = plugins

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        caller = getattr(self._plugins.manager.hook, name)

        def call(**arguments: Any) -> list[Any]:
            try:
                return caller(**arguments)
            except BaseException as error:
                for info in self._raised_in(caller, error):
                    error.add_note(f"raised in hook {name} of {info}")
                raise

        return call

    def _raised_in(self, caller: pluggy.HookCaller, error: BaseException) -> list[PluginInfo]:
        codes = {frame.f_code for frame, _ in walk_tb(error.__traceback__)}
        return [
            self._plugins.infos[impl.plugin_name]
            for impl in caller.get_hookimpls()
            if getattr(impl.function, "__code__", None) in codes and impl.plugin_name in self._plugins.infos
        ]


def load_plugins(
    block: Iterable[str] = (), require: Iterable[str] = (), extra: Iterable[Any] = (), strict: bool = True
) -> Plugins:
    """Load every installed plugin.

    Args:
        block: names of plugins, or of distributions, that are left out.
        require: requirements such as `miles-grpo>=0.1` that loaded plugins must satisfy.
        extra: modules or objects with hook implementations, registered after the installed ones.
        strict: raise when anything is wrong. Otherwise what is wrong is in `Plugins.faults`, and the sound plugins
            are loaded.

    Raises:
        PluginError: one of its subclasses when all faults are of one sort; it lists all of them.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager, blocked=tuple(block), required=tuple(require))
    for info, load in _candidates(plugins, extra):
        try:
            _register(plugins, info, load())
        except PluginError as error:
            plugins.faults.append(error)
        except Exception as error:
            fault = PluginLoadError(f"{info} ({info.module}) could not be loaded: {type(error).__name__}: {error}")
            fault.__cause__ = error
            plugins.faults.append(fault)
    plugins.faults.extend(_unmet(plugins))
    if strict:
        plugins.raise_faults()
    return plugins


def compare_provenance(expected: Sequence[Mapping[str, Any]], actual: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each difference between two provenances; empty when they agree."""
    theirs, ours = ({entry["name"]: entry for entry in side} for side in (expected, actual))
    lines = [f"{name}: not installed here" for name in sorted(theirs.keys() - ours.keys())]
    lines += [f"{name}: installed only here" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        for key, wanted in theirs[name].items():
            if (found := ours[name].get(key)) != wanted:
                lines.append(f"{name}: {key} is {found!r}, expected {wanted!r}")
    return lines


# -------------------------------------------------------------------------------------------------------- discovery


def _candidates(plugins: Plugins, extra: Iterable[Any]) -> Iterable[tuple[PluginInfo, Callable[[], Any]]]:
    found: dict[str, list[EntryPoint]] = {}
    known: set[str] = set()
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        names = {point.name, _info(point).distribution}
        known |= names
        if not names & {*plugins.blocked}:
            found.setdefault(point.name, []).append(point)
    for name in sorted({*plugins.blocked} - known):
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"installed: {', '.join(sorted(known))}"
        logger.warning("no plugin %r is installed that could be left out; %s", name, hint)
    for name, points in found.items():
        infos = [_info(point) for point in points]
        if len(points) > 1:
            claims = " and ".join(f"{info.distribution} {info.version} ({info.module})" for info in infos)
            plugins.faults.append(
                PluginConflictError(
                    f"plugin {name!r} is claimed by {claims}: "
                    f"uninstall one of them, or leave it out with -p no:{infos[-1].distribution}"
                )
            )
            continue
        yield infos[0], points[0].load
    for thing in extra:
        name = getattr(thing, "__name__", type(thing).__name__)
        yield PluginInfo(name, "(given in Python)", "", name), repeat(thing).__next__


def _info(point: EntryPoint) -> PluginInfo:
    dist = point.dist
    name, release = (dist.name, dist.version) if dist else ("(unknown distribution)", "")
    return PluginInfo(point.name, name, release, point.value)


def _register(plugins: Plugins, info: PluginInfo, plugin: Any) -> None:
    api = getattr(plugin, "MILES_API", None)
    info = replace(info, api=api)
    if api is not None and api != API_VERSION:
        raise PluginLoadError(
            f"{info} was made for plugin API {api}; this miles has API {API_VERSION}. "
            f"Install a release of {info.distribution} for API {API_VERSION}, or leave it out with -p no:{info.name}"
        )
    _check_marked(info, plugin)
    try:
        plugins.manager.register(plugin, name=info.name)
    except pluggy.PluginValidationError as error:
        raise HookError(f"{info}: {error}") from error
    except ValueError as error:
        raise PluginConflictError(f"{info}: {error}") from error
    try:
        _check_pending(plugins.manager, info)
        plugins.registrations.extend(_collect(plugins.manager, info))
    except Exception:
        plugins.manager.unregister(name=info.name)
        raise
    plugins.infos[info.name] = info


# ------------------------------------------------------------------------------------------------------- soundness


def _hook_names() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("miles_")]


def _check_marked(info: PluginInfo, plugin: Any) -> None:
    """A function named like a hook without the marker would be ignored in silence."""
    for name in _hook_names():
        function = getattr(plugin, name, None)
        if inspect.isroutine(function) and not hasattr(function, _MARK):
            raise HookError(f"{info}: {name} has no @hookimpl above it, so it would never be called; add the marker")


def _implementations(
    manager: pluggy.PluginManager, info: PluginInfo
) -> Iterator[tuple[pluggy.HookCaller, pluggy.HookImpl]]:
    """A plugin's own, of whatever it takes for hooks."""
    plugin = manager.get_plugin(info.name)
    for caller in manager.get_hookcallers(plugin) or []:
        yield from ((caller, impl) for impl in caller.get_hookimpls() if impl.plugin is plugin)


def _check_pending(manager: pluggy.PluginManager, info: PluginInfo) -> None:
    faults = []
    for caller, impl in _implementations(manager, info):
        if not caller.has_spec() and not impl.optionalhook:
            close = get_close_matches(caller.name, _hook_names(), n=1)
            faults.append(f"{caller.name} is no hook of miles" + (f"; did you mean {close[0]}?" if close else ""))
    if faults:
        raise HookError(f"{info}: " + "; ".join(sorted(faults)) + " (miles/hookspecs.py lists all hooks)")


def _collect(manager: pluggy.PluginManager, info: PluginInfo) -> list[Registration]:
    collected = []
    for caller, impl in _implementations(manager, info):
        if caller.has_spec() and caller.name.startswith(REGISTERS):
            kind = caller.name.removeprefix(REGISTERS)
            offered: Any = impl.function()
            _check_offer(info, caller.name, kind, offered)
            collected += [Registration(kind, name, value, info) for name, value in offered.items()]
    return collected


def _check_offer(info: PluginInfo, hook: str, kind: str, offered: Any) -> None:
    if not isinstance(offered, Mapping):
        raise HookError(f"{info}: {hook} returned {type(offered).__name__}; it must return a mapping from names")
    expected: type = Mapping if kind == "presets" else Component
    for name, value in offered.items():
        if not isinstance(name, str) or not name or set(name) & set("/:, =\n\t"):
            raise HookError(f"{info}: {hook} offers the name {name!r}; use letters, digits, '_', '-' and '.'")
        if not isinstance(value, expected):
            wanted = "a config overlay (a mapping)" if kind == "presets" else "a Component"
            raise HookError(f"{info}: {hook} offers {name!r} as {type(value).__name__}; it must be {wanted}")


def _unmet(plugins: Plugins) -> Iterable[PluginError]:
    loaded = {canonicalize_name(info.distribution): info for info in plugins.infos.values()}
    for text in plugins.required:
        try:
            wanted = Requirement(text)
        except InvalidRequirement as error:
            yield PluginConflictError(f"plugins.require has {text!r}, which is no requirement: {error}")
            continue
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        info = loaded.get(canonicalize_name(wanted.name))
        if info is None:
            yield PluginConflictError(
                f"plugins.require asks for {text!r}: {_absence(wanted.name)}. Fix: pip install {text!r}"
            )
        elif not wanted.specifier.contains(info.version, prereleases=True):
            yield PluginConflictError(
                f"plugins.require asks for {text!r}, but {info} is installed. Fix: pip install {text!r}"
            )


def _absence(distribution: str) -> str:
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    return f"{distribution} {found} is installed, but none of its plugins is loaded (blocked, or broken)"
