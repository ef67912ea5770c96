"""What a simulated run did, and the least time in which it could have been done.

    T_k      end of training step k (0, 1, ...), in seconds from the start of the run; T_-1 = 0
    y        seconds of a weight sync; version k is in the engines at V_k = T_{k-1} + y
    train    seconds of a training step
    alone_k  the longest trajectory of batch k if it had an engine to itself: its tokens at the speed of a single
             sequence, its prefills, its tools, one after the other
    work_k   what all trajectories of batch k cost an engine whose slots are always full: tokens at the highest
             throughput, and prefills
    s        staleness that the mode permits: nothing in batch k begins before version k - s is in the engines

Whatever a mode does, with the batches that it trained,

    T_k >= T_{k-1} + y + train                           there is one trainer, and it waits for its weights to leave
    T_k >= V_{k-s} + max(alone_k, work_k) + train        a batch is generated between its weights and its training
    T_k >= y + work_0 + ... + work_k + train             there is one engine

and the last `T_k` that these give is the critical path: the bound. Synchronous training is s = 0. Where trajectories
are carried over from step to step but nothing is generated during training, the second line is
`T_k >= T_{k-1} + y + work_k + train`. Where one batch is generated after the other (one step off), there is also
`T_k >= (y + max(alone_0, work_0)) + ... + (y + max(alone_k, work_k)) + train`. With no limit on staleness, and no
beginning and end, what remains is

    max(steps * (train + y), work_0 + work_1 + ...)      the free bound: that the busier device is never idle

Samples that were generated and not trained on are in no bound: they are time lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from simulated.engine import EngineOptions

from miles.api import Group, Sample
from miles.rollout.ledger import TRAINED
from miles.rollout.task import RESTARTED


@dataclass(frozen=True)
class Trajectory:
    """One sample that was trained on."""

    decoded: int
    """Tokens of the model."""
    prefilled: int
    """Tokens of prompt and tools."""
    tools: float
    """Seconds of its tools."""
    oldest: int
    """Version of its first token."""
    mean_version: float

    @classmethod
    def of(cls, sample: Sample) -> Trajectory:
        versions = sample.columns["weight_version"]
        own = versions[versions >= 0]
        tools = sample.metadata.get("environment", {}).get("tool_seconds", 0.0)
        return cls(len(own), len(sample.tokens) - len(own), tools, int(own.min()), float(own.mean()))

    def alone(self, engine: EngineOptions) -> float:
        return self.decoded * engine.step_seconds(1) + self.prefilled * engine.prefill_ms / 1e3 + self.tools

    def work(self, engine: EngineOptions, slots: int) -> float:
        return self.decoded * engine.step_seconds(slots) / slots + self.prefilled * engine.prefill_ms / 1e3


@dataclass(frozen=True)
class Step:
    """One training step."""

    started: float
    ended: float
    trajectories: Sequence[Trajectory]
    restarted: int
    """Times that a trajectory of the batch had to begin again."""

    @classmethod
    def of(cls, started: float, ended: float, groups: Sequence[Group]) -> Step:
        samples = [sample for group in groups for sample in group.samples]
        restarted = sum(sample.metadata.get(RESTARTED, 0) for sample in samples)
        return cls(started, ended, [Trajectory.of(sample) for sample in samples], restarted)


@dataclass
class Trace:
    """A run, seen from outside."""

    steps: list[Step] = field(default_factory=list)
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    """What the run told its trackers."""
    generated: int = 0
    """Tokens that the engine made, whatever became of them."""
    busy: float = 0.0
    """Seconds in which the engine ran something."""
    fates: Mapping[str, int] = field(default_factory=dict)
    """Samples, by what became of them: the account that the run keeps."""

    @property
    def seconds(self) -> float:
        """Until the last batch was trained."""
        return self.steps[-1].ended

    @property
    def trained(self) -> int:
        """Tokens of the model in all batches."""
        return sum(one.decoded for step in self.steps for one in step.trajectories)

    @property
    def dropped(self) -> int:
        """Samples that were generated and not trained on."""
        return sum(count for fate, count in self.fates.items() if fate != TRAINED)

    def lags(self) -> tuple[float, int]:
        """Training steps between a token's weights and the batch it is trained in: of all tokens on average, and the
        most there were."""
        lags = [
            ((number - one.mean_version) * one.decoded, number - one.oldest)
            for number, step in enumerate(self.steps)
            for one in step.trajectories
        ]
        return sum(lag for lag, _ in lags) / self.trained, max(most for _, most in lags)


@dataclass(frozen=True)
class Machine:
    """What time is bounded by."""

    engine: EngineOptions
    slots: int
    """Sequences at once: of the engine, or fewer where the run asks for fewer."""
    train: float
    sync: float

    def works(self, trace: Trace) -> list[float]:
        return [sum(one.work(self.engine, self.slots) for one in step.trajectories) for step in trace.steps]

    def free_bound(self, trace: Trace) -> float:
        return max(len(trace.steps) * (self.train + self.sync), sum(self.works(trace)))

    def critical_path(
        self, trace: Trace, staleness: int | None, carries: bool = False, one_by_one: bool = False
    ) -> float:
        """Seconds. `staleness` is s, None for no limit; `carries`: trajectories go on in later steps, and nothing is
        generated during training; `one_by_one`: a batch is generated after the other, with a weight sync between."""
        ends: list[float] = []
        generated = 0.0
        works = self.works(trace)
        for k, step in enumerate(trace.steps):
            before = ends[-1] if ends else 0.0
            least = [before + self.sync + self.train, self.sync + float(np.sum(works[: k + 1])) + self.train]
            first = 0 if staleness is None else max(k - staleness, 0)
            weights = (ends[first - 1] if first else 0.0) + self.sync
            alone = max(one.alone(self.engine) for one in step.trajectories)
            if carries:
                least.append(before + self.sync + works[k] + self.train)
            elif staleness is not None or k == 0:
                least.append(weights + max(alone, works[k]) + self.train)
            if one_by_one:
                generated += self.sync + max(alone, works[k])
                least.append(generated + self.train)
            ends.append(max(least))
        return ends[-1]


def told(name: str, trace: Trace, machine: Machine, path: float) -> dict[str, Any]:
    """A row of the table; `path` is the critical path in seconds."""
    seconds, steps = trace.seconds, len(trace.steps)
    mean, most = trace.lags()
    return {
        "mode": name,
        "s/step": seconds / steps,
        "steps/h": 3600 * steps / seconds,
        "of its bound": path / seconds,
        "of the free bound": machine.free_bound(trace) / seconds,
        "engine busy": min(trace.busy / seconds, 1.0),
        "engine full": trace.generated / seconds * machine.engine.step_seconds(machine.slots) / machine.slots,
        "trainer idle": 1 - sum(step.ended - step.started for step in trace.steps) / seconds,
        "lag mean": mean,
        "lag max": most,
        "dropped": trace.dropped,
        "tokens lost": 1 - trace.trained / max(trace.generated, 1),
    }
