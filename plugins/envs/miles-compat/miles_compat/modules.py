"""`from slime.utils.types import Sample` without slime: a finder for the modules that functions of upstream import.

It answers for the names in `OFFERED` alone, below `slime` and below `miles`, and for the packages in which they lie,
where no package is installed that really is called so. So the core's own package `miles` is as it was, with modules
beside it that the core does not have. Of a slime that is installed the other modules stay its own; those that are
offered here come from here, because the `Sample` of slime itself would be another class than the one that functions
are given.

The finder is put among Python's when the first function of upstream is looked for, and stays.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ROOTS = ("slime", "miles")
OFFERED = {
    "utils.types": "samples",
    "utils.http_utils": "http",
    "utils.misc": "loading",
    "utils.async_utils": "running",
    "utils.processing_utils": "tokenizers",
    "rollout.base_types": "inputs",
    "rollout.sglang_rollout": "single_turn",
    "rollout.inference_rollout.inference_rollout_common": "single_turn",
    "rollout.generate_hub.single_turn": "single_turn",
    "rollout.filter_hub.base_types": "filters",
    "rollout.filter_hub.dynamic_sampling_filters": "filters",
    "rollout.rm_hub": "rewards",
}
"""Module below `slime` and `miles` -> the module of `miles_compat.offered` whose `__all__` it has."""
PACKAGES = {"", "utils", "rollout", "rollout.filter_hub", "rollout.generate_hub", "rollout.inference_rollout"}
"""What they lie in."""
PLACES = PACKAGES | OFFERED.keys()
REAL = {"", "rollout"}
"""Packages of the core, of which other modules are none of this plugin's business."""


class Offered(MetaPathFinder, Loader):
    """The finder, and the loader of what it finds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, name = fullname.partition(".")
        if root not in ROOTS or not (name in PLACES or name.rpartition(".")[0] in PLACES - REAL):
            return None
        installed = PathFinder.find_spec(fullname, path)
        if name in OFFERED:
            spec = ModuleSpec(fullname, self, origin=f"miles_compat.offered.{OFFERED[name]}", is_package=True)
            spec.submodule_search_locations = list((installed and installed.submodule_search_locations) or ())
            return spec
        if installed is not None:
            return None
        if name in PACKAGES:
            return ModuleSpec(fullname, self, origin="miles_compat", is_package=True)
        raise ModuleNotFoundError(
            f"No module named {fullname!r}: miles-compat offers {', '.join(f'{root}.{each}' for each in OFFERED)}",
            name=fullname,
        )

    def exec_module(self, module: ModuleType) -> None:
        source = OFFERED.get(module.__name__.partition(".")[2])
        if source is None:
            return
        offered = importlib.import_module(f"miles_compat.offered.{source}")
        module.__doc__ = offered.__doc__
        for name in offered.__all__:
            setattr(module, name, getattr(offered, name))


def offer_modules() -> None:
    """Let Python find them."""
    if not any(isinstance(finder, Offered) for finder in sys.meta_path):
        sys.meta_path.insert(0, Offered())
