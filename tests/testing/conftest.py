"""Contracts run against components that are right, and against ones that are wrong in one way each."""

import inspect

import pytest

from miles.api import Component
from miles.testing import ComponentContract, standard_tests


def contract_with(contract, built, **members):
    """A test class of a contract whose component is an object, not a registered name. `built` makes it."""
    component = Component("fake:fake", **members.pop("says", {}))

    def build(self, **options):
        return built()

    return type("TestFake", (contract,), {"build": build, "component": component, **members})()


def run(test, folder):
    arguments = {"tmp_path": folder} if "tmp_path" in inspect.signature(test).parameters else {}
    if arguments:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        test(**arguments)
    finally:
        getattr(test.__self__, "teardown_class", lambda: None)()


def own_tests(contract):
    """The standard tests of a kind alone."""
    common = standard_tests(ComponentContract)
    return [name for name, test in standard_tests(contract).items() if test is not common.get(name)]


@pytest.fixture
def passes(tmp_path):
    """`passes(contract, make)`: every test of the kind passes (or is skipped) on what `make` builds."""

    def check(contract, built, **members):
        for name in own_tests(contract):
            try:
                run(getattr(contract_with(contract, built, **members), name), tmp_path / name)
            except pytest.skip.Exception:
                continue

    return check


@pytest.fixture
def catches(tmp_path):
    """`catches(contract, {test: [make, ...]})`: each test fails on each of the wrong components listed for it, and
    every test of the kind but `harmless` ones is listed, unless there are `others` that are not. A component may come
    with members: `(make, {...})`."""

    def check(contract, mutants, harmless=(), others=False, **members):
        missed = []
        for name, wrong in mutants.items():
            for number, entry in enumerate(wrong):
                built, extra = entry if isinstance(entry, tuple) else (entry, {})
                test = getattr(contract_with(contract, built, **{**members, **extra}), name)
                try:
                    run(test, tmp_path / f"{name}-{number}")
                except pytest.skip.Exception:
                    missed.append(f"{name} is skipped on wrong component {number}")
                except (Exception, pytest.fail.Exception):
                    continue
                else:
                    missed.append(f"{name} passes on wrong component {number}")
        assert missed == [], "\n".join(missed)
        assert others or set(own_tests(contract)) == set(mutants) | set(harmless), "tests without a wrong component"

    return check
