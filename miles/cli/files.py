"""Do the files that a configuration names exist? Asked once, by the command line, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from miles.config.faults import Fault
from miles.config.load import Resolved

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS = re.compile(r"@\[[^\]]*\]$")


def missing_files(resolved: Resolved) -> list[Fault]:
    """One fault for each file or folder that is named and is not there. Hub names are not looked up."""
    config = resolved.config
    faults: list[Fault] = []
    for where in ("data", "eval"):
        for task_set in getattr(config, where).sets:
            if task_set.path and not task_set.path.startswith("hub:"):
                faults += _missing(resolved, f"{where}.sets.{task_set.name}.path", _ROWS.sub("", task_set.path))
    for key in ("hf_checkpoint", "ref_load"):
        name = getattr(config.model, key)
        if name and not _HUB_NAME.fullmatch(name):
            faults += _missing(resolved, f"model.{key}", name)
    if config.checkpoint.load is not None:
        faults += _missing(resolved, "checkpoint.load", str(config.checkpoint.load))
    return faults


def _missing(resolved: Resolved, key: str, name: str) -> Iterator[Fault]:
    path = Path(name).expanduser()
    if path.exists():
        return
    folder = path.parent
    if folder.is_dir():
        close = get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
        remedy = f"did you mean {folder / close[0]}?" if close else f"{folder} exists, but has no {path.name}"
    else:
        remedy = f"the folder {folder} does not exist either (looked from {Path.cwd()})"
    yield Fault(key, "there is no such file or folder", remedy, name, resolved.origin(key))
