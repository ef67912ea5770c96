"""What our own code costs: rollouts through an engine that has its answers ready.

python scripts/rollout_overhead.py                    # CPU and wall time for each turn, 1,000 sessions at once
python scripts/rollout_overhead.py --profile 25       # and where it goes
python scripts/rollout_overhead.py --memory 10000     # memory after so many episodes of a whole run, in five parts

Producer, tasks, generate functions, chat format (the tokenizer's template, one token a byte), engine front, rewards and
columns are those of every run; the engine (`simulated/instant.py`) and the environment, which echoes, cost next to
nothing. A turn is one answer of the model: 128 tokens of it, and in a conversation what is echoed, up to 64 characters.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import logging
import os
import pstats
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from simulated.job import make_run, settings
from simulated.trace import Trace

from miles.api import Metrics, RunInfo
from miles.loop import train
from miles.run import Run
from miles.workers.garbage import settle, unsettle

GROUP = 8
TASKS: dict[str, dict[str, Any]] = {
    "single_turn": {"generate": "single_turn", "reward": "exact_match"},
    "multi_turn": {"environment": {"name": "echo", "turns": 10}, "reward": "environment", "max_turns": 20},
}
PARTS = 5


@dataclass(frozen=True)
class Cost:
    """Of one turn, in milliseconds, over everything that was collected."""

    turns: int
    cpu_ms: float
    wall_ms: float


async def prepared(task: str, sessions: int, steps: int, tokens: int, folder: Path, stack: AsyncExitStack) -> Run:
    """A run of so many episodes a step, all at once. Its training takes no time and its trace is not kept."""
    rollout = {
        "engine": "instant",
        "num_rollout": steps,
        "batch_size": sessions // GROUP,
        "n_samples_per_prompt": GROUP,
        "concurrency": sessions,
    }
    config = settings(folder, {"sampling": {"max_new_tokens": tokens}, **TASKS[task]}, rollout, chat_format="template")
    config["weight_sync"]["transport"] = {"name": "simulated", "seconds": 0.0}
    return await make_run(config, 0.0, Forgetful(), stack)


class Forgetful(Trace):
    """Keeps nothing, so that what grows is the run's own."""

    def __init__(self) -> None:
        super().__init__(steps=Nothing(), metrics=Nothing())


class Nothing(list[Any]):
    def append(self, item: Any) -> None:
        """It is gone."""


async def measure(task: str, sessions: int = 1000, rounds: int = 3, tokens: int = 128, profile: int = 0) -> Cost:
    """Collect `rounds` batches after one that does not count."""
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            run = await prepared(task, sessions, rounds + 1, tokens, Path(folder), stack)
            await run.push_weights()
            await run.collect()
            settle()  # as every run does once it is built
            stack.callback(unsettle)
            turns, cpu, wall = 0, time.process_time(), time.perf_counter()
            if profile:
                profiler.enable()
            for _ in range(rounds):
                groups, _ = await run.collect()
                turns += sum(len(sample.turns) for group in groups for sample in group.samples)
            profiler.disable()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(profile)
    return Cost(turns, 1e3 * cpu / turns, 1e3 * wall / turns)


@dataclass(frozen=True)
class Memory:
    """After a part of the episodes, in KiB."""

    episodes: int
    resident: float
    traced: float
    """What Python has allocated; 0 where it was not traced, which makes everything several times as slow."""


class Scales:
    """A tracker that weighs the process every so many episodes."""

    def __init__(self, sessions: int, every: int):
        self.sessions, self.every = sessions, every
        self.found: list[Memory] = []

    def start(self, info: RunInfo) -> None:
        """There is nothing to open."""

    def log(self, step: int, metrics: Metrics) -> None:
        if step and step * self.sessions % self.every == 0:
            gc.collect()
            traced = tracemalloc.get_traced_memory()[0] / 1024
            self.found.append(Memory(step * self.sessions, resident_kib(), traced))

    def finish(self, status: str) -> None:
        """Nor to close."""


async def memory(task: str, episodes: int, sessions: int = 200, tokens: int = 32, traced: bool = True) -> list[Memory]:
    """A whole run of so many episodes: loop, producer, tracking; its training does nothing."""
    scales = Scales(sessions, episodes // PARTS)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            run = await prepared(task, sessions, episodes // sessions, tokens, Path(folder), stack)
            run.tracking.trackers.append(("scales", scales))
            if traced:
                tracemalloc.start()
                stack.callback(tracemalloc.stop)
            await train(run)
    return scales.found


def resident_kib() -> float:
    """Of this process, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    parser.add_argument("--memory", type=int, default=0, metavar="EPISODES")
    given = parser.parse_args(words)
    logging.getLogger("miles").setLevel(logging.ERROR)
    for task in TASKS:
        if given.memory:
            for at in asyncio.run(memory(task, given.memory)):
                size = f"{at.resident / 1024:.1f} MiB resident, {at.traced / 1024:.2f} MiB of Python objects"
                print(f"{task:12} after {at.episodes:6} episodes: {size}", flush=True)
        else:
            cost = asyncio.run(measure(task, given.sessions, given.rounds, given.tokens, given.profile))
            each = f"{cost.cpu_ms:.3f} ms of CPU, {cost.wall_ms:.3f} ms of wall time"
            print(f"{task:12} {cost.turns:6} turns, of each {each}", flush=True)


if __name__ == "__main__":
    main()
