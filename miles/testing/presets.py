"""The contract of presets: config overlays by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from miles.config import Config
from miles.config.components import components_of
from miles.config.leaves import leaf_above
from miles.kinds import KINDS
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.testing.contract import Contract, installed


class PresetContract(Contract):
    """A mapping of sections to settings.

    Example:
        class TestDapo(PresetContract):
            name = "dapo"
    """

    kind = "presets"

    @property
    def overlay(self) -> Mapping[str, Any]:
        return installed().preset(self.name)[0]

    def test_it_sets_something(self) -> None:
        """An empty preset is a name that promises what it does not do."""
        assert leaves_of(self.overlay)

    def test_it_is_a_valid_configuration(self) -> None:
        """Every key is known and every value fits, so that naming the preset is never what is wrong."""
        unknown = [".".join(path) for path, _ in leaves_of(self.overlay) if leaf_above(path) is None]
        assert unknown == [], "these keys are in no section"
        Config.model_validate(copy.deepcopy(dict(self.overlay)))

    def test_its_components_are_there(self) -> None:
        """Every component that it names comes with it, with miles, or with another installed plugin, and takes the
        options that it is given."""
        problems, set_here = [], [path for path, _ in leaves_of(self.overlay)]
        for use in components_of(Config.model_validate(copy.deepcopy(dict(self.overlay)))):
            named = any(use.path[: len(path)] == path for path in set_here)
            if named and use.name not in KINDS[use.kind].words:
                problems += [f"{use.key}: {fault}" for fault in installed().check(use.kind, use.name, use.options)]
        assert problems == []

    def test_it_leaves_alone_what_is_the_users(self) -> None:
        """Model, data and where a run lives are no part of a recipe."""
        paths = {".".join(path) for path, _ in leaves_of(self.overlay)}
        theirs = sorted(p for p in paths if p.startswith(("run.", "model.hf_checkpoint", "data.sets", "eval.sets")))
        assert theirs == []

    def test_it_is_the_same_each_time(self) -> None:
        """The driver and every worker ask for it by themselves."""
        again, _ = Registry(load_plugins(strict=False)).preset(self.name)
        assert again == self.overlay


def leaves_of(overlay: Mapping[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Path and value of everything that an overlay sets."""
    found = []
    for key, value in overlay.items():
        path = (*at, key)
        if isinstance(value, Mapping) and leaf_above(path) is None:
            found += leaves_of(value, path)
        else:
            found.append((path, value))
    return found
