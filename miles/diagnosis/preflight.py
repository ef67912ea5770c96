"""What would stop a run at once, found before anything is built or written.

Files, folders and functions are looked at by the code that the run itself uses, and the answers are its own. Nothing is
fetched, and no hub is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from miles.checkpoint_io import local_checkpoint
from miles.config import TaskSet
from miles.config.base import AUTO
from miles.config.components import components_of
from miles.config.faults import ConfigFaults, Fault
from miles.config.leaves import leaves
from miles.config.load import Purpose, Resolved
from miles.config.placement import Placement
from miles.data.screening import Screened, screen
from miles.errors import ConfigError, DataError, MilesError
from miles.kinds import KINDS
from miles.options import read_options
from miles.registry import Entry
from miles.rollout.replay import batches_to_replay
from miles.targets import import_target

FIRST_ROWS = 10_000
"""Of each set: a run reads all of them when it is built."""


def require_ready(resolved: Resolved, purpose: Purpose = "train") -> None:
    """Raises ConfigFaults for everything that `preflight` finds."""
    if faults := preflight(resolved, purpose):
        raise ConfigFaults(faults)


def preflight(resolved: Resolved, purpose: Purpose = "train") -> list[Fault]:
    """What would stop a run of this configuration."""
    return [
        *_data(resolved, purpose), *_replay(resolved, purpose), *_checkpoints(resolved, purpose), *_gpus(resolved),
        *_functions(resolved), *_options(resolved),
    ]  # fmt: skip


def sets_of(resolved: Resolved, purpose: Purpose) -> dict[str, TaskSet]:
    """Dotted path -> task set, of those whose files can be read here; none where the data source is somebody's own."""
    config = resolved.config
    if config.data.source != leaves()["data", "source"].default:
        return {}
    places = {"data": config.data.sets, "eval": config.eval.sets}
    if purpose in ("eval", "rollout"):
        del places["data" if purpose == "eval" else "eval"]
    if purpose == "train" and config.rollout.replay is not None:
        return {}
    every = {f"{where}.sets.{task_set.name}": task_set for where, sets in places.items() for task_set in sets}
    return {key: s for key, s in every.items() if s.path is not None and not s.path.startswith("hub:")}


def first_rows(resolved: Resolved, task_set: TaskSet) -> Screened:
    """A set's file with its first rows read. Errors as in `screen`."""
    return screen(task_set, skip=resolved.config.data.bad_lines == "skip", most=FIRST_ROWS)


def _data(resolved: Resolved, purpose: Purpose) -> Iterator[Fault]:
    for key, task_set in sets_of(resolved, purpose).items():
        try:
            first_rows(resolved, task_set)
        except DataError as error:
            path = str(task_set.path)
            yield _fault(resolved, f"{key}.path", error, path, _nearest(path.partition("@[")[0]))


def _replay(resolved: Resolved, purpose: Purpose) -> Iterator[Fault]:
    """The batches are there, and fit."""
    folder = resolved.config.rollout.replay
    if folder is None or purpose != "train":
        return
    try:
        batches_to_replay(resolved.config)
    except MilesError as error:
        yield _fault(resolved, "rollout.replay", error, str(folder), _nearest(str(folder)))


def _checkpoints(resolved: Resolved, purpose: Purpose) -> Iterator[Fault]:
    config = resolved.config
    named = {"model.hf_checkpoint": config.model.hf_checkpoint, "model.ref_load": config.model.ref_load}
    for key, name in named.items():
        if name is not None and not (purpose in ("eval", "rollout") and key == "model.ref_load"):
            try:
                local_checkpoint(name)
            except ConfigError as error:
                yield _fault(resolved, key, error, name, _nearest(name))
    load = config.checkpoint.load
    if load is not None and not load.exists() and purpose != "eval":
        problem = DataError("there is no such file or folder")
        yield _fault(resolved, "checkpoint.load", problem, str(load), _nearest(str(load)))


def _gpus(resolved: Resolved) -> Iterator[Fault]:
    """Where all workers are on this machine, it has a GPU for each, or none at all and works on its CPU."""
    config, registry = resolved.config, resolved.registry
    try:
        placed = Placement.of(config, registry)
    except MilesError:
        return  # reported already
    here = "one node" in registry.component("executors", placed.executor.name).provides
    if placed.gpus < 2 or not here:
        return
    count = import_target("torch.cuda:device_count")()
    if placed.gpus > count and (count or config.resources.device != AUTO):
        key = "resources.actor_num_gpus_per_node"
        if placed.train_ranks <= count:
            key = "rollout.num_engines" if config.resources.rollout_num_gpus is None else "resources.rollout_num_gpus"
        section, name = key.split(".")
        remedy = (
            "ask for fewer, let engines share the trainer's (without --rollout-num-gpus and --rollout-num-engines), or "
            "--executor ray for several machines"
        )
        yield Fault(
            key, f"{placed.arithmetic}, and this machine shows {count}",
            remedy if count else "--device cpu, or auto (`miles doctor` says why no GPU is found)",
            getattr(getattr(config, section), name), resolved.origin(key),
        )  # fmt: skip


def _functions(resolved: Resolved) -> Iterator[Fault]:
    """Rewards, and functions of somebody's own, can be called with what they will get. Classes are only imported: to
    build one may take long."""
    registry = resolved.registry
    for use in components_of(resolved.config):
        kind, entry = KINDS[use.kind], _entry(resolved, use.kind, use.name)
        if entry is None or not (use.kind == "rewards" or (entry.live and "__call__" in vars(kind.protocol))):
            continue  # its module may need torch
        try:
            thing = entry.load()
            if not inspect.isclass(thing) and not registry.check(use.kind, use.name, use.options):
                registry.build(use.kind, use)
        except MilesError as error:
            yield _fault(resolved, use.key, error, use.name, "")


def _options(resolved: Resolved) -> Iterator[Fault]:
    """What options name is there, as far as they have a `preflight` that looks."""
    for use in components_of(resolved.config):
        entry = _entry(resolved, use.kind, use.name)
        if entry is None or not hasattr(entry.component.options, "preflight"):
            continue
        options, faults = read_options(entry.component.options, use.options)
        try:
            if not faults:
                options.preflight()
        except MilesError as error:
            yield _fault(resolved, use.key, error, use.name, "")


def _entry(resolved: Resolved, kind: str, name: str) -> Entry | None:
    """None for words of the core, and for names at fault, which are reported already."""
    try:
        return None if name in KINDS[kind].words else resolved.registry.entry(kind, name)
    except MilesError:
        return None


def _fault(resolved: Resolved, key: str, error: Exception, value: str, remedy: str) -> Fault:
    notes = "; ".join(getattr(error, "__notes__", ()))
    return Fault(key, str(error), remedy or notes, value, resolved.origin(key))


def _nearest(name: str) -> str:
    """What a path that does not exist may have been meant to be; nothing where it exists."""
    path = Path(name).expanduser()
    if path.exists():
        return ""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either (looked from {Path.cwd()})"
    close = get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"did you mean {folder / close[0]}?" if close else f"{folder.resolve()} exists, but has no {path.name}"
