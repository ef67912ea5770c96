"""`miles report`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from miles.cli import Call
from miles.errors import ConfigError

HELP = """usage: miles report RUN [RUN2 ...] [--out FILE] [--steps FIRST:LAST] [--samples N]

Writes one HTML file with the curves, samples and settings of a run, or of several runs beside each other.
It needs no network and no server: open it in a browser.
  RUN                 a run directory (run.dir)
  --out FILE          report.html in the run's directory; for several runs, in this one; its folder must be there
  --steps FIRST:LAST  samples of these steps alone, both included; 120 is 120:120
  --samples N         at most N samples, over all runs (100,000), whatever they weigh; 0 for none"""


def run(call: Call) -> int:
    """Write the report and say where it is."""
    if call.help:
        print(HELP)
        return 0
    out, steps, samples = (call.take_value(flag) for flag in ("--out", "--steps", "--samples"))
    for word in call.words:
        if word.startswith("-"):
            raise ConfigError(f"miles report takes --out, --steps and --samples, not {word}; see miles report --help")
    if not call.words:
        raise ConfigError(f"miles report needs a run directory\n{HELP}")
    from miles.report.page import REPORT, write_report
    from miles.report.samples import MAX_SAMPLES, Selection

    directories = [Path(word) for word in call.words]
    path = Path(out) if out else (directories[0] if len(directories) == 1 else Path()) / REPORT
    if path.is_dir():
        raise ConfigError(f"--out {path} is a directory; name a file in it, such as {path / REPORT}")
    if out and not path.parent.exists():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it first (mkdir -p {path.parent})")
    if samples is not None and not samples.isdecimal():
        raise ConfigError(f"--samples {samples}: a whole number is expected, 0 for none")
    chosen = (
        Selection(MAX_SAMPLES, _steps(steps)) if samples is None else Selection(int(samples), _steps(steps), 10**15)
    )
    for note in write_report(directories, path, chosen):
        print(f"note: {note}", file=sys.stderr)
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None:
        raise ConfigError(f"--steps {text}: FIRST:LAST is expected, such as 100:120, or one step")
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise ConfigError(f"--steps {text}: the first step comes after the last; {last}:{first} is the other way round")
    return first, last
