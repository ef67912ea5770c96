"""What `--dry-run` prints: components, numbers and placement of a run that could start now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from miles.cli.rows import component_rows
from miles.config.derived import Numbers
from miles.config.load import Resolved
from miles.diagnosis.preflight import first_rows, sets_of
from miles.log import counted
from miles.plugins import Plugins


def describe(resolved: Resolved, plugins: Plugins) -> str:
    """The whole description."""
    blocks: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("plugins", [(info.name, f"{info.distribution} {info.version}") for info in plugins.infos.values()]),
        ("components", component_rows(resolved)),
        ("data", _data(resolved) or [("read when the run begins",)]),
        ("numbers", _numbers(resolved)),
        ("placement", _placement(resolved)),
    ]
    lines = [line for title, rows in blocks for line in (f"{title}:", *_table(rows), "")]
    headers = plugins.hook.miles_report_header(config=resolved.config)
    lines += [line for header in headers for line in ([header] if isinstance(header, str) else header or [])]
    return "\n".join([*lines, "dry run: the configuration is valid; nothing was built"])


def _numbers(resolved: Resolved) -> list[tuple[str, str]]:
    """What follows from the configuration; where it depends on the data, in words."""
    rollout, numbers = resolved.config.rollout, Numbers.of(resolved.config)
    steps = f"as many as {rollout.num_epoch} epochs of the prompts take" if rollout.num_rollout is None else None
    known = {
        "num_rollout": steps or rollout.num_rollout,
        **asdict(numbers),
        "total_optimizer_steps": steps or (rollout.num_rollout or 0) * numbers.optimizer_steps_per_rollout,
    }
    by_sets = "as many as the task sets of its prompts draw"
    return [(name, by_sets if value is None else str(value)) for name, value in known.items()]


def _placement(resolved: Resolved) -> list[tuple[str, ...]]:
    config, numbers = resolved.config, Numbers.of(resolved.config)
    resources = config.resources
    interval = config.weight_sync.interval
    nodes, each = resources.actor_num_nodes, resources.actor_num_gpus_per_node
    where = f"{resources.executor.name}, device {resources.device}"
    asleep = "asleep while training" if numbers.offload_rollout else "stays awake"
    trainer = "offloaded during rollouts" if numbers.offload_train else "stays in memory"
    shared = "shares the trainer's devices" if resources.colocate else "devices of its own where there are several"
    return [
        ("role", "workers", "where", "when idle"),
        ("trainer", f"{counted(nodes, 'node')} x {counted(each, 'rank')}", where, trainer),
        (f"engine {config.rollout.engine.name}", "1", shared, asleep),
        (f"weights by {config.weight_sync.transport.name}", "", f"every {counted(interval, 'step')}", ""),
    ]


def _data(resolved: Resolved) -> list[tuple[str, str, str]]:
    """The sets whose files were looked at, and how much of each; the others a run opens."""
    rows = []
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
