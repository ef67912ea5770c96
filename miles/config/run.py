"""`run`: what this run is called, where it writes, and how it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from miles.config.base import Flag, Section


class RunSection(Section):
    name: Annotated[str, Flag("--run-name")] = "run"
    """Name of the run, for people and trackers."""
    dir: Annotated[Path, Flag("--run-dir")] = Path("runs/run")
    """Directory of everything the run writes. The same command on the same directory resumes it."""
    seed: Annotated[int, Flag("--seed")] = 1234
    """Seed of what is initialised at random. Data order and the samples' draws have `data.seed`; dropout is off."""
    deterministic: Annotated[bool, Flag("--deterministic-mode")] = False
    """Deterministic kernels and scheduling: a killed and resumed run ends bit for bit where an unbroken one does."""
    resume: Annotated[Literal["auto", "never", "must"], Flag("--resume")] = "auto"
    """auto: go on from the newest good checkpoint of the run directory, if there is one."""
    report: Annotated[bool, Flag("--report")] = True
    """Write `report.html` to the run's directory when the run ends, however it ends."""
    num_threads: Annotated[int | None, Flag("--num-threads")] = None
    """Threads of torch on a CPU; all cores when not given."""
