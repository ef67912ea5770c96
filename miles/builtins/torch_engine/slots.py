"""The running requests, slot by slot: who sits where, and the numbers that every step needs, as arrays.

Slots `[0, count)` are taken, without gaps. Everything that a decoding step reads or writes for all requests at once is
a NumPy array over slots; Python objects are touched only when a request enters or leaves. `_S` slots, `_M` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.api import GenerateRequest, GenerateResult
from miles.builtins.torch_engine.sampler import seed_key


@dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    request: GenerateRequest
    future: Any
    """What the caller awaits; the engine's thread never touches it."""
    limit: int
    """Length at which it ends."""
    order: tuple[int, int]
    """Place in the queue: priority first, then arrival."""
    tokens: list[int]
    """Prompt, and what was generated before it last left a slot."""
    log_probs: list[float] = field(default_factory=list)
    """Of the generated tokens among `tokens`."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(length, version): from this length on, tokens are of this version."""
    kv_version: int = -1
    """Version that all its keys and values are of; -1 once they are of several."""
    cached_tokens: int | None = None
    experts: np.ndarray | None = None
    """Rows of expert choices from when it left a slot, if they are asked for: computed again, they may differ."""
    listener: Callable[[GenerateResult], None] | None = None
    """Hears of tokens as they are made; called in the event loop."""
    told: int = 0
    """Generated tokens that it has heard of."""

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    def versions_between(self, start: int, end: int) -> list[int]:
        """Of the tokens at `[start, end)` of its sequence, as far as they were generated."""
        ends = [*(length for length, _ in self.versions[1:]), end]
        spans = [(max(first, start), min(last, end), v) for (first, v), last in zip(self.versions, ends, strict=False)]
        return [version for first, last, version in spans for _ in range(first, last)]

    def __lt__(self, other: Job) -> bool:
        return self.order < other.order


class Slots:
    def __init__(self, slots: int, length: int):
        self.capacity, self.length = slots, length
        self.count = 0
        self.jobs: list[Job] = []
        self.tokens_SM = np.zeros((slots, length + 1), np.int64)
        self.log_probs_SM = np.zeros((slots, length + 1), np.float32)
        self.lengths_S = np.zeros(slots, np.int64)
        """Tokens each sequence has; the last of them is not in the cache yet."""
        self.limits_S = np.zeros(slots, np.int64)
        self.free_from_S = np.zeros(slots, np.int64)
        """Length from which a sequence may end: before, its stop tokens are banned."""
        self.seeds_S = np.zeros(slots, np.uint64)
        self._arrays = (self.lengths_S, self.limits_S, self.free_from_S, self.seeds_S)

    def add(self, job: Job) -> int:
        """Seat a job in the next slot."""
        slot, tokens = self.count, job.tokens
        self.tokens_SM[slot, : len(tokens)] = tokens
        start = job.prompt_length
        self.log_probs_SM[slot, start : start + len(job.log_probs)] = job.log_probs
        self.lengths_S[slot] = len(tokens)
        self.limits_S[slot] = job.limit
        self.free_from_S[slot] = start + job.request.sampling.min_new_tokens
        self.seeds_S[slot] = seed_key(job.request.seed)
        self.jobs.append(job)
        self.count += 1
        return slot

    def append(self, slots: slice, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """One more token for each of these."""
        rows = np.arange(slots.start, slots.stop)
        ends = self.lengths_S[slots]
        self.tokens_SM[rows, ends] = tokens
        self.log_probs_SM[rows, ends] = log_probs
        self.lengths_S[slots] += 1

    def generated(self, slot: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities since the prompt."""
        span = slice(self.jobs[slot].prompt_length, int(self.lengths_S[slot]))
        return self.tokens_SM[slot, span].tolist(), self.log_probs_SM[slot, span].tolist()

    def news(self, slot: int) -> GenerateResult | None:
        """What its request has generated since this was last asked."""
        job, end = self.jobs[slot], int(self.lengths_S[slot])
        span = slice(job.prompt_length + job.told, end)
        if span.start == end:
            return None
        job.told += end - span.start
        tokens, log_probs = self.tokens_SM[slot, span].tolist(), self.log_probs_SM[slot, span].tolist()
        versions = job.versions_between(span.start, end)
        return GenerateResult(tokens, log_probs, "", versions, cached_tokens=job.cached_tokens or 0)

    def sequence(self, slot: int) -> list[int]:
        return self.tokens_SM[slot, : self.lengths_S[slot]].tolist()

    def clear(self) -> None:
        self.jobs.clear()
        self.count = 0

    def remove(self, slot: int) -> int | None:
        """Free a slot. The last sequence takes its place; returns where that one sat, if it had to move."""
        last = self.count - 1
        self.count = last
        moved = self.jobs.pop()
        if slot == last:
            return None
        self.jobs[slot] = moved
        length = self.lengths_S[last]
        self.tokens_SM[slot, :length] = self.tokens_SM[last, :length]
        self.log_probs_SM[slot, :length] = self.log_probs_SM[last, :length]
        for array in self._arrays:
            array[slot] = array[last]
        return last
