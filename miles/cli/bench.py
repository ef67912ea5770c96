"""`miles bench`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from miles.cli import Call
from miles.errors import ConfigError

if TYPE_CHECKING:
    from miles.bench.record import Results

HELP = """usage: miles bench [NAME ...] [--list] [--rounds N] [--warmup N] [--device auto|cpu|cuda]
                   [--size cpu|gpu|smoke] [--json FILE] [--baseline FILE] [--save-baseline FILE]

Measures how fast the parts of miles are on this machine. Without names every benchmark runs; `engine` stands for all
that begin with `engine_`. Models have random weights, and everything lies in a temporary folder.
  --list                 names, and what they measure
  --rounds N             times each is measured, in turns with the others (7)
  --warmup N             rounds before these that do not count (1)
  --size                 of models and workloads; goes by the device. smoke only shows that everything runs
  --json FILE            write every value, with versions and machine
  --save-baseline FILE   the same, unless a benchmark failed or was not finished
  --baseline FILE        compare: a median that moved by more than 5 % and by more than both spreads together is said
With any of these three the yardstick `machine` runs too: when it moved, so did the machine.
Exit code 1 when such a change is for the worse, or when a benchmark failed; 130 after Ctrl-C, with what there is."""

FLAGS = ("--list", "--rounds", "--warmup", "--device", "--size", "--json", "--baseline", "--save-baseline")


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line."""

    names: Sequence[str]
    rounds: int
    warmup: int
    device: str
    size: str | None
    json: Path | None
    baseline: Path | None
    save_baseline: Path | None


def run(call: Call) -> int:
    """Measure, print, write, compare."""
    if call.help:
        print(HELP)
        return 0
    listing, wish = call.take("--list"), read_wish(call)
    from miles.bench.measure import YARDSTICK
    from miles.bench.table import chosen

    compares = wish.names and any((wish.json, wish.baseline, wish.save_baseline))
    benchmarks = chosen([*wish.names, YARDSTICK] if compares else wish.names)
    if listing:
        width = max(map(len, benchmarks))
        print("\n".join(f"{name:<{width}}  {benchmark.about}" for name, benchmark in benchmarks.items()))
        return 0
    from miles.bench.compare import compare
    from miles.bench.printed import printed
    from miles.bench.rounds import measure, new_results

    results = new_results(wish.device, wish.size)
    baseline = read_baseline(wish.baseline, results, benchmarks)
    measure(benchmarks, results, wish.rounds, wish.warmup, call.blocked)
    for path in (wish.json, wish.save_baseline if results.whole else None):
        if path is not None:
            results.write(path)
            print(f"miles: wrote {path}", file=sys.stderr)
    comparison = compare(baseline.measured, results.measured, baseline.settings, results.settings) if baseline else None
    print(printed(results, comparison))
    if wish.save_baseline and not results.whole:
        print(f"miles: {wish.save_baseline} is not written: not everything was measured", file=sys.stderr)
    if results.interrupted:
        return 130
    return 1 if results.errors or (comparison and comparison.regressions) else 0


def read_baseline(path: Path | None, now: Results, names: Collection[str]) -> Results | None:
    """What it has of the benchmarks that are run now.

    Raises:
        ConfigError: it is no file of results, or of workloads of another size.
    """
    if path is None:
        return None
    from miles.bench.record import read_results

    baseline = read_results(path)
    if baseline.size != now.size:
        raise ConfigError(f"--baseline {path} is of size {baseline.size}, and this is {now.size}: other workloads")
    mine = {name: found for name, found in baseline.measured.items() if name.partition("/")[0] in names}
    return replace(baseline, measured=mine)


def read_wish(call: Call) -> Wish:
    """Raises ConfigError for a flag or a number that makes no sense."""
    wish = Wish(
        rounds=_count(call, "--rounds", 7, least=1),
        warmup=_count(call, "--warmup", 1, least=0),
        device=call.take_value("--device") or "auto",
        size=call.take_value("--size"),
        json=_path(call, "--json"),
        baseline=_path(call, "--baseline"),
        save_baseline=_path(call, "--save-baseline"),
        names=call.words,
    )
    for word in call.words:
        if word.startswith("-"):
            close = get_close_matches(word, FLAGS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"miles bench does not take {word!r}; {hint}see `miles bench --help`")
    return wish


def _count(call: Call, flag: str, default: int, least: int) -> int:
    text = call.take_value(flag)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} {text}: a number from {least} on is expected")
    return int(text)


def _path(call: Call, flag: str) -> Path | None:
    text = call.take_value(flag)
    return Path(text) if text is not None else None
