"""The sample filter `slime_function`: what a dynamic sampling filter of slime or Miles says."""

from __future__ import annotations

from typing import Any

from miles.api import Group, HookError, Status, Verdict
from miles_compat.calling import load_function
from miles_compat.conversion import theirs
from miles_compat.namespace import args
from miles_compat.plugin import FilterOptions


class SlimeFilter:
    """Asks the function about the samples of a group that did not fail; upstream has no others. It runs in the driver,
    and holds it up."""

    def __init__(self, options: FilterOptions):
        self.path = options.path
        self._function = load_function(options.path)

    def __call__(self, group: Group) -> Verdict:
        samples = [theirs(sample) for sample in group.samples if sample.status is not Status.FAILED]
        if not samples:
            return Verdict(False, "all_failed")
        said: Any = self._function(args(), samples)
        keep, reason = getattr(said, "keep", said), getattr(said, "reason", None)
        try:
            return Verdict(bool(keep), "" if keep else str(reason or "filtered"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise HookError(f"{self.path} returned {said!r}; a DynamicFilterOutput or a bool is expected") from error
