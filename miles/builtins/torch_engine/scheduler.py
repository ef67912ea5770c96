"""Continuous batching: which requests run, one step after the other. Everything here happens in the engine's thread.

A step seats waiting requests (copying cached prefixes, prefilling the rest) and then decodes one token for every
running one. Decisions follow from the requests and their order alone, never from a clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.api import EngineError, GenerateResult, PauseMode
from miles.builtins.torch_engine.arena import Arena
from miles.builtins.torch_engine.attention import DecodeAttention
from miles.builtins.torch_engine.budget import Budget
from miles.builtins.torch_engine.decoder import Decoder
from miles.builtins.torch_engine.prefill import Piece, prefill
from miles.builtins.torch_engine.prefix_cache import Match, PrefixCache
from miles.builtins.torch_engine.sampler import SamplingBatch, draw, uniforms
from miles.builtins.torch_engine.scoring import ScoreJob, Scores, score
from miles.builtins.torch_engine.slots import Job, Slots
from miles.builtins.torch_engine.stopping import StopStrings, StopWatch

SHARED = 32
"""A request waits a moment for another one that computes at least as many tokens it needs too."""
Outcome = GenerateResult | Scores | Exception


class Scheduler:
    def __init__(
        self, decoder: Decoder, budget: Budget, strings: StopStrings, max_prefill_tokens: int, cuda_graphs: bool
    ):
        self.decoder, self.budget = decoder, budget
        self.max_prefill_tokens = max_prefill_tokens
        self.prefix = PrefixCache(budget.prefix_tokens)
        self.watch = StopWatch(strings)
        self.version = -1
        self.paused = self.asleep = False
        self.waiting: list[Job] = []
        self.scores: list[ScoreJob] = []
        self.finished: list[tuple[Any, Outcome]] = []
        """Futures and what they shall hold, for the engine to hand over."""
        self.arena = Arena(decoder, cuda_graphs)
        self.slots = Slots(0, 0)
        self._arrived = False
        self._seating: list[Job] = []
        self._sampling: SamplingBatch | None = None

    # ------------------------------------------------------------------------------------------------- from the engine

    @property
    def runnable(self) -> bool:
        return not self.paused and not self.asleep and bool(self.slots.count or self.waiting or self.scores)

    def submit(self, job: Job) -> None:
        heapq.heappush(self.waiting, job)
        self._arrived = True

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass for everything that runs, after seating what waits."""
        try:
            if self.scores:
                self._score()
            if self.waiting:
                self._admit()
            if self.slots.count:
                self._decode()
        except Exception as error:
            self._fail(error)

    def news(self) -> list[tuple[Callable[[GenerateResult], None], GenerateResult]]:
        """Who listens, and the tokens made since the last news."""
        listening = [(slot, job.listener) for slot, job in enumerate(self.slots.jobs) if job.listener is not None]
        told = [(listener, self.slots.news(slot)) for slot, listener in listening]
        return [(listener, piece) for listener, piece in told if piece is not None]

    def abort(self, wanted: Callable[[Job], bool]) -> None:
        """End these requests with what they have."""
        for job in [job for job in self.waiting if wanted(job)]:
            self.waiting.remove(job)
            self._resolve(job, job.tokens[job.prompt_length :], job.log_probs, "abort")
        heapq.heapify(self.waiting)
        self._abort_running(wanted)

    def _abort_running(self, wanted: Callable[[Job], bool]) -> None:
        for slot in reversed(range(self.slots.count)):
            if wanted(self.slots.jobs[slot]):
                self._finish(slot, "abort")

    def pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode == "abort":
            self._abort_running(lambda job: True)
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        self.paused = False

    def retract(self, keep_cache: bool = False) -> None:
        """Put what runs back to the queue, with the tokens it has."""
        for slot in reversed(range(self.slots.count)):
            job = self.slots.jobs[slot]
            if keep_cache:
                self._remember(slot)
            job.experts = self._experts(slot)
            job.tokens = self.slots.sequence(slot)
            _, job.log_probs = self.slots.generated(slot)
            self.submit(job)
        self.slots.clear()
        self._sampling = None

    def new_weights(self, version: int) -> None:
        """Later tokens are of this version; what runs goes on, but its cache is worth nothing to others."""
        self.version = version
        self.flush()
        for slot, job in enumerate(self.slots.jobs):
            job.kv_version = -1
            job.versions.append((int(self.slots.lengths_S[slot]), version))

    def flush(self) -> None:
        """Forget prefixes; if nothing runs, the next request finds everything as the first one did."""
        self.prefix.clear()
        if not self.slots.count:
            self.slots = Slots(0, 0)
            self._arrived = bool(self.waiting)

    def release(self) -> None:
        """Give the cache's memory back; what runs is put back to the queue."""
        self.retract()
        self.flush()
        self.arena.free()

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        self._fit()
        free = self.slots.capacity - self.slots.count
        if not free or (free * 8 < self.slots.capacity and free < len(self.waiting)):
            return  # seat several at once, not one whenever one leaves
        self._seating = self._next_jobs(free)
        leaders, followers = self._leaders(self._seating)
        self._seat(leaders)
        if followers:
            self._seat([(job, self.prefix.match(job.tokens)) for job in followers])
        self._seating = []

    def _next_jobs(self, free: int) -> list[Job]:
        """At most `free` and at most one prefill of tokens, but at least one."""
        jobs, tokens = [heapq.heappop(self.waiting)], 0
        while self.waiting and len(jobs) < free:
            tokens += len(jobs[-1].tokens)
            if tokens + len(self.waiting[0].tokens) > self.max_prefill_tokens:
                break
            jobs.append(heapq.heappop(self.waiting))
        return jobs

    def _fit(self) -> None:
        """Cut the cache anew if what has arrived, or has grown, calls for more or longer slots."""
        if not self._arrived:
            return
        self._arrived = False
        slots, jobs = self.slots, [*self.slots.jobs, *self.waiting]
        longest = max(max(len(job.tokens) for job in self.waiting), *slots.lengths_S[: slots.count], slots.length)
        more, longer = self.budget.geometry(len(jobs), int(longest), max(job.limit for job in jobs))
        idle_and_longer = not slots.count and longer > slots.length and more >= slots.capacity
        if longest > slots.length or more > slots.capacity or idle_and_longer:
            self._cut(more, longer)

    def _cut(self, slots: int, length: int) -> None:
        self.retract(keep_cache=True)
        self.arena.cut(slots, length)
        self.slots = Slots(slots, length)

    def _leaders(self, jobs: Sequence[Job]) -> tuple[list[tuple[Job, Match]], list[Job]]:
        """Requests to compute first, and those that can then start from what they share with one of them."""
        leaders: list[tuple[Job, Match]] = []
        followers: list[Job] = []
        seen: set[tuple[int, ...]] = set()
        for job in jobs:
            match = self.prefix.match(job.tokens)
            rest = (match.tokens, *job.tokens[match.tokens : match.tokens + SHARED])
            if match.hidden is None and rest in seen and self.prefix.budget:
                followers.append(job)
            else:
                leaders.append((job, match))
                seen.add(rest)
        return leaders, followers

    def _seat(self, found: list[tuple[Job, Match]]) -> None:
        """Give requests a slot, bring their cache there, and draw their first token."""
        found = sorted(found, key=lambda pair: _missing(*pair))
        first = self.slots.count
        for job, match in found:
            self.slots.add(job)
            job.kv_version = self.version
            job.versions.append((len(job.tokens), self.version))
            if job.cached_tokens is None:
                job.cached_tokens = match.tokens
        self._sampling = None
        self._copy_prefixes(first, [match for _, match in found])
        hidden_BH = self._prefill(first, found)
        logits_BV = self.decoder.logits(hidden_BH)
        batch = SamplingBatch.of([job.request.sampling for job, _ in found], self.decoder.device)
        self.watch.attend([job.request.sampling for job in self.slots.jobs])
        self._draw(slice(first, self.slots.count), logits_BV, batch)

    def _copy_prefixes(self, first: int, matches: Sequence[Match]) -> None:
        slot = first
        for path, same in groupby(matches, key=lambda match: match.path):
            end = slot + len(list(same))
            position = 0
            for node, used in path:
                self.arena.cache.write(slice(slot, end), position, node.segment, used)
                position += used
            slot = end

    def _prefill(self, first: int, found: Sequence[tuple[Job, Match]]) -> Tensor:
        """Hidden states at the last token of each request, `[B, H]`; new prefixes go to the prefix cache."""
        known = [match.hidden for _, match in found if match.hidden is not None]
        rows = [torch.stack(known)] if known else []
        missing = found[len(known) :]
        pieces = [Piece(job.tokens, match.tokens) for job, match in missing]
        if pieces:
            last: dict[int, Tensor] = {}
            for group, counts, hidden_TH in prefill(
                self.decoder, self.arena.cache, first + len(known), pieces, self.max_prefill_tokens
            ):
                ends = torch.tensor(counts, device=hidden_TH.device).cumsum(0) - 1
                last |= dict(zip(group, hidden_TH[ends], strict=True))
            rows.append(torch.stack([last[i] for i in range(len(pieces))]))
            for i, piece in enumerate(pieces):
                read = partial(self.arena.cache.read, first + len(known) + i)
                self.prefix.insert(piece.tokens, read, last[i].clone())
        return torch.cat(rows)

    # --------------------------------------------------------------------------------------------------------- decoding

    def _decode(self) -> None:
        slots = self.slots
        lengths = slots.lengths_S[: slots.count]
        longest, shortest = int(lengths.max()), int(lengths.min())
        if longest > slots.length:
            self._arrived = True
            self.retract(keep_cache=True)
            self._admit()
            return
        if self._sampling is None:
            params = [job.request.sampling for job in slots.jobs]
            self._sampling = SamplingBatch.of(params, self.decoder.device)
            self.watch.attend(params)
        inputs = np.stack((slots.tokens_SM[np.arange(slots.count), lengths - 1], lengths - 1))
        ids_B, positions_B = torch.from_numpy(inputs).to(self.decoder.device)
        graphs = self.arena.graphs
        if graphs is not None:
            logits_BV = graphs.step(ids_B, positions_B, longest)
        else:
            even = longest == shortest
            attention = DecodeAttention(self.decoder.config, self.arena.cache, positions_B, longest, even)
            logits_BV = self.decoder.logits(self.decoder.forward(ids_B, positions_B, attention))
        self._draw(slice(0, slots.count), logits_BV, self._sampling)

    def _draw(self, span: slice, logits_BV: Tensor, batch: SamplingBatch) -> None:
        """Draw a token for each of these slots, and let go of the requests that it ends."""
        slots = self.slots
        uniform = torch.from_numpy(uniforms(slots.seeds_S[span], slots.lengths_S[span]))
        drawn = draw(logits_BV, batch, uniform.to(logits_BV.device), self._banned(span, logits_BV))
        chosen_B, log_probs_B = (tensor.cpu().numpy() for tensor in drawn)
        slots.append(span, chosen_B, log_probs_B)
        full_B = slots.lengths_S[span] >= slots.limits_S[span]
        notable_B = self.watch.watched_V[chosen_B] | full_B | ~np.isfinite(log_probs_B)
        if notable_B.any():
            for index in reversed(np.flatnonzero(notable_B).tolist()):
                self._look_at(span.start + index)

    def _banned(self, span: slice, logits_BV: Tensor) -> Tensor | None:
        """Stop tokens of requests that must not end yet, `[B, V]`."""
        early_B = self.slots.lengths_S[span] < self.slots.free_from_S[span]
        if not early_B.any():
            return None
        banned = np.zeros(logits_BV.shape, bool)
        for index in np.flatnonzero(early_B).tolist():
            ids = self.slots.jobs[span.start + index].request.sampling.stop_token_ids
            banned[index, [i for i in ids if i < banned.shape[1]]] = True
        return torch.from_numpy(banned).to(logits_BV.device)

    def _look_at(self, slot: int) -> None:
        """A request drew a token that may end it."""
        slots, job = self.slots, self.slots.jobs[slot]
        length = int(slots.lengths_S[slot])
        if not np.isfinite(slots.log_probs_SM[slot, length - 1]):
            problem = f"torch engine: the model's output for request {job.request.id!r} is not finite"
            self.finished.append((job.future, EngineError(f"{problem}; its weights may have diverged")))
            self.arena.cache.clear(slot)
            self._vacate(slot)
            return
        generated = slots.tokens_SM[slot, job.prompt_length : length].tolist()
        if length >= slots.free_from_S[slot] and self.watch.stops(generated, job.request.sampling):
            self._finish(slot, "stop")
        elif length >= slots.limits_S[slot]:
            self._finish(slot, "length")

    # ---------------------------------------------------------------------------------------------------------- leaving

    def _finish(self, slot: int, reason: str) -> None:
        job = self.slots.jobs[slot]
        job.experts = self._experts(slot)
        self._remember(slot)
        self._resolve(job, *self.slots.generated(slot), reason)
        self._vacate(slot)

    def _experts(self, slot: int) -> np.ndarray | None:
        """Rows of expert choices that a request wants: those it brought here, then those that are here."""
        job, table = self.slots.jobs[slot], self.arena.cache.experts_SMLK
        if not job.request.routed_experts or table is None:
            return None
        brought = [] if job.experts is None else [job.experts]
        start = job.request.routed_experts_from + sum(map(len, brought))
        here = table[slot, start : int(self.slots.lengths_S[slot]) - 1].cpu().numpy()
        return np.concatenate([*brought, here])

    def _remember(self, slot: int) -> None:
        """Keep what a request computed for others, if all of it is of the current weights."""
        if self.prefix.budget and self.slots.jobs[slot].kv_version == self.version:
            self.prefix.insert(self.slots.sequence(slot)[:-1], partial(self.arena.cache.read, slot))

    def _vacate(self, slot: int) -> None:
        moved = self.slots.remove(slot)
        if moved is not None:
            self.arena.cache.move(moved, slot, int(self.slots.lengths_S[slot]) - 1)
        self._sampling = None

    def _resolve(self, job: Job, tokens: list[int], log_probs: list[float], reason: Any) -> None:
        versions = job.versions_between(job.prompt_length, job.prompt_length + len(tokens))
        result = GenerateResult(tokens, log_probs, reason, versions, job.experts, job.cached_tokens or 0)
        self.finished.append((job.future, result))

    def _fail(self, error: Exception) -> None:
        """A step went wrong: what it was about is lost, with the cache. If it was about nothing yet, what waits is."""
        jobs = list(dict.fromkeys([*self.slots.jobs, *self._seating])) or self.waiting
        for job in jobs:
            failure = EngineError(f"torch engine: a step failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.finished.append((job.future, failure))
        if jobs is self.waiting:
            self.waiting = []
        self._seating = []
        self.slots.clear()
        self.release()

    def _score(self) -> None:
        jobs = list(self.scores)
        self.scores.clear()  # and not another list: who is about to add to it may know this one
        try:
            scored = score(self.decoder, jobs, self.max_prefill_tokens)
            self.finished += [(job.future, log_probs) for job, log_probs in zip(jobs, scored, strict=True)]
        except Exception as error:
            failure = EngineError(f"torch engine: scoring failed: {type(error).__name__}: {error}")
            self.finished += [(job.future, failure) for job in jobs]


def _missing(job: Job, match: Match) -> int:
    """Tokens that must be computed before the first can be drawn."""
    return 0 if match.hidden is not None else len(job.tokens) - match.tokens
