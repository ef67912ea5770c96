"""Runs benchmarks in rounds: one after the other, then again, so that a slow phase of the machine hits all of them."""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miles.bench.machine import Watch, machine
from miles.bench.measure import Benchmark, Circumstances, Measured, Round
from miles.bench.record import Results
from miles.bench.sizes import SIZES
from miles.bench.workbench import Workbench
from miles.errors import ConfigError, RunInterrupted
from miles.modeling import resolve_device
from miles.rundir import versions

Say = Callable[[str], None]


def new_results(device: str, size: str | None) -> Results:
    """Empty ones, for this machine. `size` goes by the device when it is None.

    Raises:
        ConfigError: there is no such device or size.
    """
    device = resolve_device(device)
    size = size or ("cpu" if device == "cpu" else "gpu")
    if size not in SIZES:
        raise ConfigError(f"--size {size}: there are {', '.join(SIZES)}")
    return Results(versions(), machine(device), size, device)


def measure(
    benchmarks: Mapping[str, Benchmark], results: Results, rounds: int, warmup: int, block: Sequence[str] = ()
) -> None:
    """Run benchmarks into `results`, which after an interruption (Ctrl-C) hold what was measured until then.
    `block`: plugins that are left out."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    session = Session(benchmarks, results, lambda line: print(f"miles: {line}", file=sys.stderr, flush=True))
    try:
        asyncio.run(_in_a_folder(session, rounds, warmup, block))
    except (KeyboardInterrupt, RunInterrupted):
        results.interrupted = True


async def _in_a_folder(session: Session, rounds: int, warmup: int, block: Sequence[str]) -> None:
    size, device = SIZES[session.results.size], session.results.device
    with tempfile.TemporaryDirectory(prefix="miles-bench-") as folder:
        async with AsyncExitStack() as stack:
            await session.run(Workbench(size, device, Path(folder), stack, block), rounds, warmup)


@dataclass
class Session:
    """The benchmarks of one call, and what they found so far: whoever stops it half-way keeps that."""

    benchmarks: Mapping[str, Benchmark]
    results: Results
    say: Say

    async def run(self, bench: Workbench, rounds: int, warmup: int) -> None:
        """Prepare all, then `warmup` rounds that do not count and `rounds` that do.

        A benchmark that fails is left out from then on, and its error is kept; the others go on.
        """
        ready = await self._prepare(bench)
        for number in range(1 - warmup, rounds + 1):
            self.say(f"round {number} of {rounds}" if number > 0 else "warm-up")
            for name in list(ready):
                if not await self._once(name, ready[name], counts=number > 0):
                    del ready[name]

    async def _prepare(self, bench: Workbench) -> dict[str, Round]:
        ready: dict[str, Round] = {}
        for name, benchmark in self.benchmarks.items():
            missing = [need for need in benchmark.needs if not _installed(need)]
            if missing:
                self.results.skipped[name] = f"needs {', '.join(missing)}: pip install {' '.join(missing)}"
                continue
            try:
                ready[name] = await benchmark.prepare(bench)
            except Exception as error:
                self._fail(name, error)
        return ready

    async def _once(self, name: str, work: Round, counts: bool) -> bool:
        gc.collect()  # what the one before has left is not this one's to clear
        seen = self.results.circumstances.setdefault(name, Circumstances()) if counts else Circumstances()
        watch = Watch.start(self.results.device)
        try:
            values = await work()
        except RunInterrupted:
            raise
        except Exception as error:
            self._fail(name, error)
            return False
        watch.stop(seen)
        if counts:
            self._note(name, values)
        return True

    def _note(self, name: str, values: Mapping[str, float]) -> None:
        benchmark = self.benchmarks[name]
        for key, full in benchmark.names(name).items():
            quantity = benchmark.quantities[key]
            measured = self.results.measured.setdefault(full, Measured(quantity.unit, quantity.better))
            measured.rounds.append(float(values[key]))

    def _fail(self, name: str, error: Exception) -> None:
        self.results.errors[name] = f"{type(error).__name__}: {error}"
        self.say(f"{name} failed: {self.results.errors[name]}")


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
