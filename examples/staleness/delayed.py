"""A weight sync whose engine is always some updates behind: what asynchronous training does to a policy, made exact.

    miles train config.yaml --weight-sync delayed:Delayed --weight-sync.transport.lag=4      # this folder on PYTHONPATH

After update `v` the engine is given the weights of update `v - lag`, those of update 0 at first, and says so: its
version, and with it `weight_version` of every sampled token, is the one that it holds. Evaluations go through the same
engine, so that what is measured at step `v` is the policy of update `v - lag`. Old weights are kept in memory alone, so
a run cannot be resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from miles.api import ConfigError, Metrics, RolloutEngine, SyncContext, WeightGroup, WeightSyncError, WorkerGroup

SEND = f"{__name__}:send"
_numbers = itertools.count()
_sent: dict[int, list[WeightGroup]] = {}
"""Copies on their way from the train worker, by number: what crosses to a worker is data."""


def send(weights: Iterable[WeightGroup], number: int) -> None:
    """Runs in the train worker: a copy of its weights, which training does not change."""
    _sent[number] = [{name: tensor.detach().clone() for name, tensor in group.items()} for group in weights]


@dataclass(frozen=True)
class DelayedOptions:
    """How far behind."""

    lag: int = 0
    """Updates that the engine's weights are behind the trainer's."""

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ConfigError(f"delayed: lag={self.lag} must not be negative")


class Delayed:
    """The transport `inprocess`, with memory: trainer and engine share a process."""

    transport = "inprocess"

    def __init__(self, options: DelayedOptions, *, context: SyncContext):
        self.lag = options.lag
        self.kept: dict[int, list[WeightGroup]] = {}
        """Version -> its weights; the last `lag + 1` versions."""

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when there are several workers, or an engine cannot receive this way."""
        if workers.size != 1:
            raise WeightSyncError(
                f"weight sync delayed: it takes the weights of one worker, and there are {workers.size}"
            )
        self.workers, self.engines = workers, [engine for engine in engines if engine.generates]
        for engine in self.engines:
            if self.transport not in engine.accepts:
                raise WeightSyncError(
                    f"weight sync delayed: {type(engine).__name__} does not receive by {self.transport!r}, but by "
                    f"{', '.join(sorted(engine.accepts)) or 'no transport'}"
                )

    async def push(self, version: int) -> Metrics:
        """On return every engine holds version `max(0, version - lag)`."""
        self.kept[version] = await self._weights(version)
        held = max(0, version - self.lag)
        if held not in self.kept:
            raise WeightSyncError(
                f"weight sync delayed: version {held} is not in memory. Old weights are lost when a run ends, and "
                "versions between two syncs are not kept: begin anew (--resume never), with --update-weights-interval 1"
            )
        self.kept = {number: weights for number, weights in self.kept.items() if number >= held}
        for engine in self.engines:
            await engine.receive(self.transport, held, iter(self.kept[held]))
        return {"weight_sync/version": float(held), "weight_sync/lag": float(version - held)}

    async def _weights(self, version: int) -> list[WeightGroup]:
        number = next(_numbers)
        try:
            await self.workers.call("send_weights", SEND, number=number)
            return _sent[number]
        except Exception as error:
            raise WeightSyncError(
                f"weight sync delayed: version {version} did not arrive: {type(error).__name__}: {error}"
            ) from error
        finally:
            _sent.pop(number, None)
