"""`Contract`: what the test classes of all kinds share: finding the component, the guard, and the standard tests that
hold for a component whatever it does.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, ClassVar, get_args

import pytest

from miles.api import API_VERSION, Component, MilesError, Need
from miles.config import Spec
from miles.config.leaves import flag_table
from miles.config.selection import SELECTS
from miles.kinds import KINDS
from miles.options import options_of, read_options, takes_any
from miles.plugins import REGISTERS, PluginInfo, load_plugins
from miles.registry import Registry

HERE = __name__.rpartition(".")[0]
HEAVY = ("torch", "transformers")
_LISTING = """
import sys
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="miles") if p.name == sys.argv[1]]
plugin = point.load()
for name in dir(plugin):
    if name.startswith(sys.argv[2]):
        getattr(plugin, name)()
print(*sys.modules)
"""


@functools.cache
def installed() -> Registry:
    """The registry of all installed plugins, faulty ones left out."""
    return Registry(load_plugins(strict=False))


@functools.cache
def modules_of_registering(plugin: str) -> frozenset[str]:
    """What a fresh process has imported once it knows what a plugin offers."""
    command = [sys.executable, "-c", _LISTING, plugin, REGISTERS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"registering in a fresh process failed:\n{done.stderr}"
    return frozenset(done.stdout.split())


class Contract:
    """Base of the contract classes; subclass the one of your kind, not this.

    The standard tests cannot be dropped in silence: one that does not apply is named in `skips` with the reason, one
    that does not pass yet in `expected_failures`. A subclass that overrides one is refused when it is made.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    """The component, as a config names it; `distribution/name` where two plugins offer the name."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Its options in these tests."""
    bad_options: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Options that must be refused, each for a value that is out of range or contradicts another."""
    skips: ClassVar[Mapping[str, str]] = {}
    """Standard test -> why it does not apply. Shown as skipped, with the reason."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Standard test -> why it fails today. Shown as xfail; an error as soon as it passes."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if not cls.__module__.startswith(f"{HERE}."):
            _guard(cls)
            _excuse(cls)

    # ------------------------------------------------------------------------------------------- finding the component

    @property
    def component(self) -> Component:
        return installed().component(self.kind, self.name)

    @property
    def plugin(self) -> PluginInfo:
        """The plugin that offers the component."""
        if KINDS[self.kind].protocol is None:
            return installed().preset(self.name)[1]
        return installed().entry(self.kind, self.name).plugin

    def build(self, **options: Any) -> Any:
        """The component with `options`, those given here over those of the class."""
        spec = Spec(name=self.name, options={**self.options, **options})
        return installed().build(self.kind, spec, context=self.context())

    def context(self) -> Any:
        """What the kind's components are built with besides their options."""
        return None

    # ---------------------------------------------------------------------------------------------------- every kind

    def test_its_plugin_is_found_and_loads(self) -> None:
        """A plugin that is not found through its entry point, or half loads, works in its author's shell only."""
        plugins = installed().plugins
        info = self.plugin
        assert info.distribution != "(given in Python)", f"{self.name} is not registered by an installed package"
        faults = [str(f) for f in plugins.faults if info.distribution in str(f) or f"plugin {info.name!r}" in str(f)]
        assert faults == []

    def test_its_plugin_says_which_api_it_was_made_for(self) -> None:
        """With `MILES_API` a plugin for another version is refused with one clear error instead of odd failures."""
        assert self.plugin.api == API_VERSION, f"plugin.py must say MILES_API = {API_VERSION}"

    def test_registering_is_light(self) -> None:
        """`miles --help` loads every plugin: one that imports torch to register makes every command seconds slower."""
        loaded = modules_of_registering(self.plugin.name)
        heavy = [name for name in HEAVY if name in loaded]
        assert not heavy, f"registering imports {', '.join(heavy)}; import only miles.api in plugin.py"


class ComponentContract(Contract):
    """What holds for all kinds but presets."""

    def test_it_is_described(self) -> None:
        """`miles plugins`, help texts and generated tables show the summary; without it a name is all people see."""
        summary = self.component.summary
        assert summary.strip(), "Component(summary=...) is missing"
        assert "\n" not in summary

    def test_the_target_is_imported_only_when_built(self) -> None:
        """The module of a component may be heavy; whoever does not use it must not pay for it."""
        target = self.component.target.partition(":")[0]
        if target != self.plugin.module:
            assert target not in modules_of_registering(self.plugin.name), f"registering imports {target}"

    def test_it_is_what_its_kind_asks_for(self) -> None:
        """Built as a run builds it, it has the methods of its protocol, with the right arguments, async where due."""
        assert self.build() is not None

    def test_its_options_are_valid(self) -> None:
        """A default that its own type refuses is found when somebody writes it down, in the middle of their work."""
        kind = self.component.options
        assert not kind or read_options(kind, dict(self.options))[1] == []
        given = {o.name: o.default for o in options_of(kind).values() if o.default is not MISSING}
        assert read_options(kind, {**given, **self.options})[1] == []

    def test_an_unknown_option_is_refused_with_a_suggestion(self) -> None:
        """A misspelt option that is ignored costs a run; the error must name the option that was meant."""
        kind = self.component.options
        if takes_any(kind):
            pytest.skip("passes unknown options on to what it wraps (extra=allow)")
        names = list(options_of(kind)) or ["nothing"]
        for name in names:
            faults = installed().check(self.kind, self.name, {**self.options, f"{name}_": 1})
            assert faults, f"the option {name}_ is accepted"
            problem = str(faults[-1]) if name == "nothing" else " ".join(map(str, faults))
            assert f"did you mean {name!r}" in problem or "it takes no options" in problem, problem

    def test_options_of_a_wrong_type_are_refused(self) -> None:
        """Options are checked before anything is built, so that a mistake costs a second and not a model load."""
        for option in options_of(self.component.options).values():
            if option.annotation is not Any:
                faults = installed().check(self.kind, self.name, {**self.options, option.name: object()})
                assert faults, f"option {option.name} accepts any object: give it a type"

    def test_bad_options_are_refused(self) -> None:
        """A value out of range that is accepted makes a run that trains on nonsense."""
        for bad in self.bad_options:
            with pytest.raises(MilesError):
                self.build(**bad)

    def test_its_flags_name_options(self) -> None:
        """A flag that sets nothing would be accepted and ignored."""
        for flag, option in self.component.flags.items():
            assert flag.startswith("--"), f"{flag!r} is no flag"
            assert option in (SELECTS, *options_of(self.component.options)), f"{flag} names no option: {option!r}"

    def test_its_flags_collide_with_no_other(self) -> None:
        """A flag means one thing, whatever else is installed: components of one kind may share it for one option."""
        owners = {flag: leaf.dotted for flag, leaf in flag_table().items()}
        owners |= {flag: who for who, flag in _flags_of_others(self.kind, self.component)}
        taken = {flag: owners[flag] for flag in self.component.flags if flag in owners}
        assert taken == {}

    def test_it_needs_what_can_be_asked_for(self) -> None:
        """A need that the core has never heard of would never be met."""
        unknown = set(self.component.needs) - set(get_args(Need))
        assert unknown == set(), f"unknown needs; known: {', '.join(get_args(Need))}"


def _flags_of_others(kind: str, own: Component) -> Iterator[tuple[str, str]]:
    for offer in installed().components():
        if offer.value is not own:
            for flag, option in offer.value.flags.items():
                if offer.kind != kind or option == SELECTS or option != own.flags.get(flag):
                    yield f"{KINDS[offer.kind].singular} {offer.name!r}", flag


# ---------------------------------------------------------------------------------------------------------- the guard


def standard_tests(contract: type[Contract]) -> dict[str, Callable]:
    """Name -> function, of the tests that a contract class of miles brings."""
    ours = next(base for base in contract.__mro__ if base.__module__.startswith(f"{HERE}."))
    return {name: getattr(ours, name) for name in dir(ours) if name.startswith("test_")}


def _guard(cls: type[Contract]) -> None:
    """Refuse a class that loses a standard test, or all of them, without saying why."""
    excused = {**cls.skips, **cls.expected_failures}
    for name, standard in standard_tests(cls).items():
        own = getattr(cls, name)
        if not callable(own) or inspect.unwrap(own) is not standard:
            raise TypeError(
                f"{cls.__name__}.{name} takes the place of a standard test of {KINDS[cls.kind].singular} contracts. "
                f'Give your own test another name; where the standard one does not apply: skips = {{"{name}": "why"}}'
            )
    for name, reason in excused.items():
        if name not in standard_tests(cls):
            known = ", ".join(sorted(standard_tests(cls)))
            raise TypeError(f"{cls.__name__} excuses {name!r}, which is no standard test of it; they are {known}")
        if not reason.strip():
            raise TypeError(f"{cls.__name__} gives no reason for leaving out {name!r}")
    for name in ("__test__", "__init__", "__new__"):
        if name in vars(cls):
            raise TypeError(f"{cls.__name__}.{name} keeps pytest from collecting its standard tests; leave it out")
    if cls.name and not cls.__name__.startswith("Test"):
        raise TypeError(f"{cls.__name__} has a component but would not be collected; call it Test{cls.__name__}")


def _excuse(cls: type[Contract]) -> None:
    """Mark the tests that a class excuses, so that pytest shows them with the reason."""
    for name, reason in cls.skips.items():
        setattr(cls, name, pytest.mark.skip(reason=reason)(_copy(getattr(cls, name))))
    for name, reason in cls.expected_failures.items():
        setattr(cls, name, pytest.mark.xfail(reason=reason, strict=True)(_copy(getattr(cls, name))))


def _copy(function: Callable) -> Callable:
    """The same test as an object of its own, since marks are kept on the function."""

    @functools.wraps(function)
    def test(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return test
