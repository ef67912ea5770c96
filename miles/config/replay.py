"""What follows from `rollout.replay`: the run trains on batches that are there, so whatever a configuration says of
engines was said of the run that made them."""

from __future__ import annotations

from collections.abc import Sequence

from miles.config.base import NONE
from miles.config.faults import Origin
from miles.config.leaves import Path
from miles.config.settings import Setting

REPLAY: Path = ("rollout", "replay")
AHEAD: tuple[Path, ...] = (("rollout", "mode"), ("rollout", "max_weight_staleness"))
ENGINES: tuple[Path, ...] = (
    *AHEAD, ("rollout", "partial_rollout"), ("rollout", "mask_offpolicy_in_partial_rollout"),
    ("weight_sync", "interval"), ("rollout", "engine"), ("rollout", "num_engines"), ("resources", "rollout_num_gpus"),
    ("resources", "rollout_num_gpus_per_engine"), ("resources", "colocate"), ("resources", "offload_train"),
    ("resources", "offload_rollout"), ("weight_sync", "transport"), ("eval", "interval"),
)  # fmt: skip


def without_engines(layers: Sequence[Sequence[Setting]], purpose: str) -> list[list[Setting]]:
    """Layers of settings, lowest first. For a run that replays, with engine `none` and no other word on engines, and
    one pass over the batches where `rollout.num_rollout` does not say otherwise. For rollouts alone, without a mode:
    it says how they go together with training."""
    if purpose == "rollout":
        return [[s for s in layer if s.path not in AHEAD] for layer in layers]
    asked = [setting for layer in layers for setting in layer if setting.path == REPLAY]
    if purpose == "eval" or not asked or asked[-1].value is None:
        return [list(layer) for layer in layers]
    origin = Origin(asked[-1].origin.kind, f"follows from {asked[-1].origin}")
    kept = [[s for s in layer if not any(s.path[: len(p)] == p for p in ENGINES)] for layer in layers]
    follows = [(("rollout", "engine", "name"), NONE), (("rollout", "num_epoch"), 1.0)]
    return [*kept, [Setting(path, value, origin) for path, value in follows]]
