"""What `--dry-run` prints: components, numbers and placement of a run that could start now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from miles.cli.rows import component_rows
from miles.component import TEACHER_NEEDS
from miles.config.base import AUTO
from miles.config.components import component_needs
from miles.config.derived import Numbers
from miles.config.load import Resolved
from miles.config.placement import Placement, generates
from miles.config.teacher import POLICY
from miles.diagnosis.preflight import first_rows, sets_of
from miles.log import counted
from miles.plugins import Plugins
from miles.rollout.replay import batches_to_replay


def describe(resolved: Resolved, plugins: Plugins) -> str:
    """The whole description."""
    placed = Placement.of(resolved.config, resolved.registry)
    blocks: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("plugins", [(info.name, f"{info.distribution} {info.version}") for info in plugins.infos.values()]),
        ("components", component_rows(resolved)),
        ("data", _data(resolved) or [("read when the run begins",)]),
        ("numbers", _numbers(resolved)),
        (f"placement, {placed.arithmetic}" if placed.gpus else "placement", _placement(resolved, placed)),
    ]
    lines = [line for title, rows in blocks for line in (f"{title}:", *_table(rows), "")]
    headers = plugins.hook.miles_report_header(config=resolved.config)
    lines += [line for header in headers for line in ([header] if isinstance(header, str) else header or [])]
    return "\n".join([*lines, "dry run: the configuration is valid; nothing was built"])


def _numbers(resolved: Resolved) -> list[tuple[str, str]]:
    """What follows from the configuration; where it depends on the data, in words."""
    rollout, numbers = resolved.config.rollout, Numbers.of(resolved.config)
    num_rollout = rollout.num_rollout
    if num_rollout is None and rollout.replay is not None:
        num_rollout = batches_to_replay(resolved.config)
    steps = f"as many as {rollout.num_epoch} epochs of the prompts take" if num_rollout is None else None
    known = {
        "num_rollout": steps or num_rollout,
        **asdict(numbers),
        "total_optimizer_steps": steps or (num_rollout or 0) * numbers.optimizer_steps_per_rollout,
    }
    by_sets = "as many as the task sets of its prompts draw"
    return [(name, by_sets if value is None else str(value)) for name, value in known.items()]


def _placement(resolved: Resolved, placed: Placement) -> list[tuple[str, ...]]:
    """Who works where: a row for each role."""
    config = resolved.config
    device, ranks, executor = config.resources.device, str(placed.train_ranks), placed.executor.name
    idle = ("stays in memory", "offloaded while engines generate")[placed.offload_train]
    asleep = ("stays in memory", "asleep while training")[placed.offload_rollout]
    if config.rollout.mode != "sync":
        asleep = f"busy: {config.rollout.mode}"

    def own(workers: int, gpus: int) -> tuple[str, str]:
        """Processes and devices of workers that are started for this."""
        gpus_or_not = {"cpu": "CPU", AUTO: f"{counted(gpus, 'GPU')}, or CPU", "cuda": counted(gpus, "GPU")}
        return f"{workers}, by {executor}", gpus_or_not.get(device, device)

    theirs = ("the trainer's", "the trainer's")
    started = own(placed.train_ranks, placed.train_ranks)
    rows = [("trainer", ranks, "this one" if placed.one_process else started[0], started[1], idle, "")]
    rows += [(name, ranks, *theirs, idle, "") for name in _other_models(resolved)]
    rows += [(f"teacher {name}", "", "a server's", url, "", "") for name, url in config.teacher.urls.items()]
    if generates(config, resolved.registry):
        every = counted(config.weight_sync.interval, "step")
        count, how = placed.num_engines, f"{placed.transport.name}, every {every}"
        where = own(count, count * placed.gpus_per_engine) if placed.engines == "apart" else theirs
        where = ("servers'", "elsewhere") if placed.engines == "elsewhere" else where
        rows.append((f"engine {config.rollout.engine.name}", str(count), *where, asleep, how))
    return [("role", "workers", "processes", "devices", "when idle", "gets weights by"), *rows]


def _other_models(resolved: Resolved) -> Iterator[str]:
    """Those that the train ranks hold besides the policy."""
    config, registry = resolved.config, resolved.registry
    needs = component_needs(config, registry)
    if "reference" in needs:
        yield "reference"
    if needs & TEACHER_NEEDS:
        yield from (f"teacher {name}" for name, place in config.teacher.load.items() if place != POLICY)
    if "critic" in needs:
        yield "critic"


def _data(resolved: Resolved) -> list[tuple[str, str, str]]:
    """The sets whose files were looked at, and how much of each; the others a run opens. Or the rollouts it replays."""
    rows = []
    if (kept := resolved.config.rollout.replay) is not None:
        rows.append(("rollout.replay", str(kept), counted(batches_to_replay(resolved.config), "step")))
    for key, task_set in sets_of(resolved, "train").items():
        found = first_rows(resolved, task_set)
        total, seen = len(found.rows), found.looked_at
        read = "all read" if seen == total else f"the first {seen} read" if seen > 1 else "the first read"
        bad = f", {found.malformed} malformed" if found.malformed else ""
        rows.append((key, str(task_set.path), f"{counted(total, 'row')}, {read}{bad}"))
    return rows


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
