"""How well each rollout mode fills engine and trainer: real loop and producer, simulated engine, tools and trainer.

A task of several turns whose responses are log-normal in length (sigma 1) and whose tools are slow, an engine that many
sequences share (`simulated/engine.py`), a trainer on a device of its own. `miles.build`, `Run`, the loop, the producer,
tasks, `multi_turn` and the engine front are those of every run. All of it on a virtual clock (`simulated/clock.py`):
hours take seconds, our own code takes no time (`rollout_overhead.py` measures that), and the same command prints the
same table. What the bounds are, `simulated/trace.py` says.

python scripts/rollout_modes.py
python scripts/rollout_modes.py --only sync 'fully_async 2' --steps 50 --train-seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from simulated.clock import VirtualLoop
from simulated.engine import EngineOptions
from simulated.job import make_run, settings
from simulated.trace import Machine, Trace, told

from miles.loop import train


@dataclass(frozen=True)
class Scene:
    """The job and the machines. Seconds are of the virtual clock."""

    steps: int = 30
    batch: int = 16
    group: int = 8
    train_seconds: float = 60.0
    """A training step."""
    sync_seconds: float = 1.0
    """Weights from trainer to engine."""
    step_ms: float = EngineOptions.step_ms
    sequence_ms: float = EngineOptions.sequence_ms
    slots: int = EngineOptions.slots
    prefill_ms: float = EngineOptions.prefill_ms
    median: float = EngineOptions.median
    """Tokens of a turn."""
    sigma: float = EngineOptions.sigma
    longest: int = 4096
    """Most tokens of a turn."""
    tool_seconds: float = 4.0
    """Median of a tool's, log-normal with sigma 1."""
    last: float = 0.3
    """Chance that a turn is the last one."""
    turns: int = 8
    """Most turns."""
    concurrency: int = 512
    """Samples in flight."""
    seed: int = 1

    @property
    def engine(self) -> dict[str, float]:
        return {one.name: getattr(self, one.name) for one in fields(EngineOptions)}

    @property
    def machine(self) -> Machine:
        slots = min(self.slots, self.concurrency)
        return Machine(EngineOptions(**self.engine), slots, self.train_seconds, self.sync_seconds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mode:
    """A way to roll out: settings under `rollout`, and what they permit."""

    settings: Mapping[str, Any]
    staleness: int | None = 0
    """Versions that a trajectory's first token may be behind; None: no limit."""
    carries: bool = False
    """Half-finished trajectories go on in the next step."""
    one_by_one: bool = False
    """One batch is generated after the other, each by one version of the weights."""


MORE = "over_sampling_batch_size"
"""Under `settings` as a multiple of the batch."""
MODES = {
    "sync": Mode({}),
    "sync, half more prompts": Mode({MORE: 1.5}),
    "sync, partial, half more prompts": Mode({"partial_rollout": True, MORE: 1.5}, staleness=None, carries=True),
    "one_step_off": Mode({"mode": "one_step_off"}, staleness=1, one_by_one=True),
    **{f"fully_async {n}": Mode({"mode": "fully_async", "max_weight_staleness": n}, n) for n in (0, 1, 2, 3, 4, 6, 8)},
    "fully_async 4, in place": Mode({"mode": "fully_async", "max_weight_staleness": 4, "pause_mode": "in_place"}, 4),
}


async def simulate(scene: Scene, mode: Mode) -> Trace:
    """A whole run. The event loop it runs in says what a second is."""
    rollout = dict(mode.settings)
    if MORE in rollout:
        rollout[MORE] = round(rollout[MORE] * scene.batch)
    task = {
        "sampling": {"max_new_tokens": scene.longest},
        "environment": {"name": "slow_tools", "median": scene.tool_seconds, "last": scene.last},
        "reward": "environment",
        "max_turns": scene.turns,
    }
    rollout |= {
        "engine": {"name": "simulated", **scene.engine},
        "num_rollout": scene.steps,
        "batch_size": scene.batch,
        "n_samples_per_prompt": scene.group,
        "concurrency": scene.concurrency,
    }
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(Path(folder), task, rollout, chat_format="fixed")
        config["data"]["seed"] = scene.seed
        config["weight_sync"]["transport"] = {"name": "simulated", "seconds": scene.sync_seconds}
        async with AsyncExitStack() as stack:
            run = await make_run(config, scene.train_seconds, trace, stack)
            await train(run)
            (engine,) = run.parts.engines
            trace.generated, trace.busy = engine.generated, engine.busy  # type: ignore[attr-defined]
            trace.fates = run.producer.ledger.fates
    return trace


def row(name: str, scene: Scene) -> dict[str, Any]:
    """One mode, in an hour that takes seconds."""
    mode = MODES[name]
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        trace = runner.run(simulate(scene, mode))
    path = scene.machine.critical_path(trace, mode.staleness, mode.carries, mode.one_by_one)
    return told(name, trace, scene.machine, path)


PERCENT = ("of its bound", "of the free bound", "engine busy", "engine full", "trainer idle", "tokens lost")
DECIMALS = {"s/step": 1, "steps/h": 1, "lag mean": 2, "lag max": 0, "dropped": 0}


def cell(name: str, value: Any) -> str:
    if name == "mode":
        return str(value)
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.{DECIMALS[name]}f}"


def parse(words: Sequence[str] | None = None) -> tuple[Scene, list[str]]:
    """Every field of `Scene` is a flag; and which modes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    for one in fields(Scene):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    given = vars(parser.parse_args(words))
    return Scene(**{name: value for name, value in given.items() if name != "only"}), given["only"]


def main() -> None:
    logging.getLogger("miles").setLevel(logging.ERROR)
    scene, names = parse()
    print(scene)
    for number, name in enumerate(names):
        found = row(name, scene)
        if not number:
            print("| " + " | ".join(found) + " |", "|---" * len(found) + "|", sep="\n")
        print("| " + " | ".join(cell(*item) for item in found.items()) + " |", flush=True)


if __name__ == "__main__":
    main()
