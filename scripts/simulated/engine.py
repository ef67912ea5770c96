"""A rollout engine that computes nothing: its answers have the lengths, and take the time, of a model on a GPU.

Every running sequence gets one token a step, and a step takes `step_ms + sequence_ms * sequences` milliseconds: alone a
sequence is fast, many together share the GPU until more of them add nothing. At most `slots` run; others wait,
in the order of priority and arrival. A request that gets a slot is prefilled first, during which nobody decodes; what
its sample left in the cache is not computed again, and new weights empty the cache.

How long a turn gets follows from the sample's seed and the position at which the turn begins, and its tokens are one
number over and over. So a turn that was aborted goes on to the length it would have had, whoever asks for the rest, and
samples are the same in whatever order they are generated.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.api import EngineContext, EngineError, EngineHealth, EnginePart, GenerateRequest, GenerateResult, PauseMode

END = 1
"""The token that ends a turn."""
SAID = 1000
"""Tokens from here on are the model's own; the others are prompts, tools and `END`."""
CODES = 100_000
REMEMBERED = 8192
"""Samples whose tokens the cache holds."""


@dataclass
class EngineOptions:
    """The defaults: 128 sequences get 8,500 tokens a second, one gets 99; never more than 25,000."""

    step_ms: float = 10.0
    """Milliseconds of a step that the first sequence pays: reading the weights."""
    sequence_ms: float = 0.04
    """Milliseconds that each sequence adds."""
    slots: int = 128
    prefill_ms: float = 0.02
    """Milliseconds for each token that is not in the cache."""
    median: float = 500.0
    """Tokens of a turn: log-normal with this median."""
    sigma: float = 1.0

    def step_seconds(self, sequences: int) -> float:
        return (self.step_ms + self.sequence_ms * sequences) / 1e3

    def turn(self, seed: int, start: int) -> tuple[int, int]:
        """What a sample says from position `start` on: the token, and how often."""
        draw = random.Random(f"{seed}.{start}")
        return SAID + draw.randrange(CODES), max(round(draw.lognormvariate(0, self.sigma) * self.median), 2)


@dataclass(order=True)
class Job:
    """A request on its way. Ordered by when it gets a slot."""

    order: tuple[int, int]
    request: GenerateRequest = field(compare=False)
    future: asyncio.Future[GenerateResult] = field(compare=False)
    token: int = field(compare=False)
    count: int = field(compare=False)
    """Tokens that it will get."""
    ends: bool = field(compare=False)
    """The last of them is `END`."""
    done: int = field(compare=False, default=0)
    """Tokens that it had when it lost its slot."""
    start: float = field(compare=False, default=0.0)
    """Step at which it got its slot."""
    end: float = field(compare=False, default=0.0)
    """Step at which it will be done."""
    cached: int = field(compare=False, default=0)
    versions: list[tuple[int, int]] = field(compare=False, default_factory=list)
    """From which of its tokens on a version of the weights spoke."""


class SimulatedEngine:
    """A `RolloutEngine` on the clock of the event loop."""

    accepts = frozenset({"simulated"})
    generates = True

    def __init__(self, options: EngineOptions, *, context: EngineContext | None = None):
        self.options = options
        self.version, self.paused = -1, False
        self.steps = 0.0
        """Decoding steps since it was started: the same for whatever runs."""
        self.generated = 0
        self.busy = 0.0
        """Seconds during which something ran."""
        self._debt = 0.0
        """Seconds of prefilling that decoding waits for."""
        self._at = 0.0
        self._arrivals = 0
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}
        """By arrival."""
        self._ends: list[tuple[float, int, Job]] = []
        """A heap of when they will be done; those that lost their slot since are still in it."""
        self._cache: OrderedDict[str, int] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._at = self._loop.time()

    # ------------------------------------------------------------------------------------------------------- requests

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        if self.version < 0:
            raise EngineError("simulated engine: no weights have arrived")
        said = spoken(request.tokens)
        token, length = self.options.turn(request.seed, len(request.tokens) - said)
        left, most = max(length - said, 1), request.sampling.max_new_tokens
        self._arrivals += 1
        order, future = (-request.priority, self._arrivals), self._loop.create_future()
        job = Job(order, request, future, token, min(left, most), ends=left <= most)
        self._advance()
        heapq.heappush(self._waiting, job)
        self._go_on()
        try:
            return await future
        except asyncio.CancelledError:
            self._drop(lambda other: other is job)
            raise

    async def abort(self, request_id: str | None = None) -> None:
        self._drop(lambda job: request_id in (None, job.request.id))

    def _drop(self, wanted: Any) -> None:
        self._advance()
        for job in [job for job in self._waiting if wanted(job)]:
            self._waiting.remove(job)
            self._finish(job, "abort")
        heapq.heapify(self._waiting)
        for job in [job for job in self._running.values() if wanted(job)]:
            self._leave(job)
            self._finish(job, "abort")
        self._go_on()

    # ------------------------------------------------------------------------------------------------------ time passes

    def _advance(self) -> None:
        """Come to the present."""
        seconds, self._at = self._loop.time() - self._at, self._loop.time()
        if self.paused or not self._running:
            return
        self.busy += seconds
        paid = min(seconds, self._debt)
        self._debt -= paid
        self.steps += (seconds - paid) / self.options.step_seconds(len(self._running))

    def _go_on(self) -> None:
        """Fill free slots, and wake up when the next sequence ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.paused:
            return
        while self._waiting and len(self._running) < self.options.slots:
            self._seat(heapq.heappop(self._waiting))
        while self._ends and not self._due(self._ends[0]):
            heapq.heappop(self._ends)
        if self._ends:
            left = max(self._ends[0][0] - self.steps, 0.0) * self.options.step_seconds(len(self._running))
            self._timer = self._loop.call_later(self._debt + left, self._arrive)

    def _arrive(self) -> None:
        """The first sequence has its last token; so have those that end with it."""
        self._timer = None
        self._advance()
        self.steps = max(self.steps, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self.steps + 1e-6:
            entry = heapq.heappop(self._ends)
            if self._due(entry):
                job = entry[2]
                self._leave(job)
                self._finish(job, "stop" if job.ends else "length")
        self._go_on()

    def _due(self, entry: tuple[float, int, Job]) -> bool:
        end, arrival, job = entry
        return arrival in self._running and end == job.end

    def _seat(self, job: Job) -> None:
        held = self._cache.get(sample_of(job.request), 0)
        tokens = len(job.request.tokens) + job.done
        cached = min(held, tokens)
        if not job.versions:
            job.cached = cached
        self._debt += (tokens - cached) * self.options.prefill_ms / 1e3
        job.start, job.end = self.steps, self.steps + job.count - job.done
        job.versions.append((job.done, self.version))
        self._running[job.order[1]] = job
        heapq.heappush(self._ends, (job.end, job.order[1], job))

    def _leave(self, job: Job) -> None:
        """Give up the slot; what was computed stays in the cache."""
        del self._running[job.order[1]]
        job.done = self._got(job)
        name = sample_of(job.request)
        self._cache[name] = len(job.request.tokens) + job.done
        self._cache.move_to_end(name)
        if len(self._cache) > REMEMBERED:
            self._cache.popitem(last=False)

    def _got(self, job: Job) -> int:
        """Tokens that a running request has so far."""
        return min(int(job.done + self.steps - job.start + 1e-6), job.count)

    def _finish(self, job: Job, reason: Any) -> None:
        if job.future.done():
            return
        tokens = [job.token] * job.done
        if reason == "stop":
            tokens[-1] = END
        versions: list[int] = []
        ends = [*(first for first, _ in job.versions[1:]), job.done]
        for (first, version), last in zip(job.versions, ends, strict=False):
            versions += [version] * (last - first)
        self.generated += job.done
        job.future.set_result(GenerateResult(tokens, [-1.0] * job.done, reason, versions, None, job.cached))

    # ---------------------------------------------------------------------------------------------------------- control

    async def pause(self, mode: PauseMode = "retract") -> None:
        self._advance()
        self.paused = True
        for job in list(self._running.values()) if mode != "in_place" else ():
            self._leave(job)
            if mode == "abort":
                self._finish(job, "abort")
            else:
                heapq.heappush(self._waiting, job)
        self._go_on()

    async def resume(self) -> None:
        self._advance()
        self.paused = False
        self._go_on()

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """What runs goes on with the new weights."""
        self._advance()
        self.version = version
        self._cache.clear()
        for job in self._running.values():
            job.versions.append((self._got(job), version))

    async def flush_cache(self) -> None:
        self._cache.clear()

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        raise EngineError("simulated engine: there is no model to score with")

    async def sleep(self, parts: frozenset[EnginePart]) -> None:
        self._cache.clear()

    async def wake(self, parts: frozenset[EnginePart]) -> None:
        """It is as it was."""

    async def health(self) -> EngineHealth:
        return EngineHealth(self.version, len(self._running), len(self._waiting))

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def spoken(tokens: Sequence[int]) -> int:
    """Tokens of a turn that is not finished, at the end of a stream."""
    count = 0
    for token in reversed(tokens):
        if token < SAID:
            break
        count += 1
    return count


def sample_of(request: GenerateRequest) -> str:
    """Requests of one sample have its name in common."""
    return request.id.rpartition(".")[0]
