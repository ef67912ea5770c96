"""`TorchEngine`: the rollout engine that needs nothing but torch. The event loop's side of it.

Its model runs in the thread that computes, a turn of a few steps at a time, so that others get theirs. Methods here
check what they are given, hand it to that thread and await a future; nothing blocks the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from miles.api import (
    EngineContext,
    EngineError,
    EngineHealth,
    EnginePart,
    GenerateRequest,
    GenerateResult,
    PauseMode,
    WeightGroup,
    WeightSyncError,
)
from miles.builtins.parking import Parking
from miles.builtins.torch_engine.budget import Budget
from miles.builtins.torch_engine.decoder import Decoder, DecoderConfig
from miles.builtins.torch_engine.handover import EngineSide, LoopSide
from miles.builtins.torch_engine.options import TorchEngineOptions
from miles.builtins.torch_engine.scheduler import Scheduler
from miles.builtins.torch_engine.scoring import ScoreJob
from miles.builtins.torch_engine.slots import Job
from miles.builtins.torch_engine.stopping import StopStrings
from miles.builtins.torch_engine.weights import WeightLoader, checkpoint_groups
from miles.toolkit import checksums, compute_thread, opened, this_process

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
TURN = 8
"""Steps after which others who wait for the thread are let in."""
NO_WEIGHTS = "no weights have arrived: sync them first, or build it with load_weights"


class TorchEngine:
    """Continuous batching over slots of one cache, a prefix cache, and seeds that make batching invisible."""

    accepts = frozenset({"inprocess", "broadcast", "disk"})
    generates = True

    def __init__(self, options: TorchEngineOptions | None = None, *, context: EngineContext):
        self.options = options or TorchEngineOptions()
        self.context = context
        self.config = DecoderConfig(**context.bridge.config_for("decoder", context.hf_config))
        self.device, self.dtype = torch.device(context.device), DTYPES[context.dtype]
        self.budget = Budget.of(self.options, self.config, self.device, self.dtype)
        self.unusable: str | None = NO_WEIGHTS
        """Why no request can be served, if none can."""
        self.asleep: frozenset[EnginePart] = frozenset()
        self.parking = Parking()
        self._ended: str | None = "was not started"
        self._turn_asked = False
        self._arrivals = itertools.count()
        self._pending: set[asyncio.Future] = set()
        self._outbox: list[tuple[Any, Any]] = []
        self._streams = 0
        """Streams that are open."""

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that it takes."""
        return self.budget.max_len

    # ------------------------------------------------------------------------------------------------------- its thread

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop_side = LoopSide(loop, self._ask_for_turn)
        self._engine_side = EngineSide(self._loop_side, self.options.handover_steps, self.options.deterministic)
        self._thread = compute_thread()
        await loop.run_in_executor(self._thread, self._build)
        self._ended = None

    def _build(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)  # of this thread, which others had before
        decoder = Decoder(self.config, self.budget.max_len, self.device, self.dtype, self.context.exact)
        strings = StopStrings(self.context.tokenizer, self.config.vocab_size)
        options = self.options
        self.scheduler = Scheduler(decoder, self.budget, strings, options.max_prefill_tokens, options.cuda_graphs)
        self.loader = WeightLoader(decoder, self.context.bridge, self.context.hf_config)
        if self.context.load_weights:
            self._load(0, checkpoint_groups(self.context.checkpoint))

    def _ask_for_turn(self) -> None:
        """Called when something has come, from either side."""
        if not self._turn_asked:
            self._turn_asked = True
            self._thread.submit(self._take_turn)

    def _take_turn(self) -> None:
        self._turn_asked = False  # what comes from here on asks again, or finds that it was asked
        if self._ended:
            return
        try:
            for _ in range(TURN):
                if not self._advance():
                    return
        except Exception as error:
            # At once, and not when the loop hears of it: the next turn may be asked for already.
            self._ended = f"stopped working: {type(error).__name__}: {error}"
            self._loop_side.loop.call_soon_threadsafe(self._end, self._ended)
            return
        self._ask_for_turn()

    def _advance(self) -> bool:
        """Pass results on, take requests in, and make a step; whether there is more to do."""
        scheduler, side = self.scheduler, self._engine_side
        if side.hand_out(self._outbox):
            self._outbox = []
        side.take_in(idle=not scheduler.runnable)
        if scheduler.runnable:
            scheduler.step()
            side.clock += 1
            if self._streams and (news := scheduler.news()):
                self._loop_side.loop.call_soon_threadsafe(_tell, news)
        self._collect()
        return scheduler.runnable or bool(self._outbox)

    def _collect(self) -> None:
        self._outbox += self.scheduler.finished
        self.scheduler.finished = []

    async def _do(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine's thread, between two steps."""
        future = self._future()

        def action() -> None:
            try:
                outcome = function()
            except Exception as error:
                outcome = error
            self._collect()  # what it ended is known before it is
            self._outbox.append((future, outcome))

        self._loop_side.submit(action)
        return await future

    def _future(self) -> asyncio.Future:
        self._check_alive()
        future = asyncio.get_running_loop().create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _check_alive(self) -> None:
        if self._ended:
            raise EngineError(f"torch engine: it is not running: it {self._ended}")

    def _end(self, reason: str) -> None:
        """In the event loop: deliver what is finished, and tell the others why they get nothing."""
        self._ended, outbox, self._outbox = reason, self._outbox, []
        error = EngineError(f"torch engine: it {reason}")
        self._loop_side.deliver([*outbox, *((future, error) for future in self._pending)])

    async def close(self) -> None:
        if not self._ended:
            self._ended = "was closed"  # the turn under way is the last
            await asyncio.get_running_loop().run_in_executor(self._thread, self._collect)
            self._end("was closed")

    # ------------------------------------------------------------------------------------------------------- generation

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        job = self._submit(request)
        try:
            return await job.future
        except asyncio.CancelledError:
            self._withdraw(job)
            raise

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        """`generate` in pieces, as the tokens are made."""
        pieces: asyncio.Queue[GenerateResult | None] = asyncio.Queue()
        job, told = self._submit(request, pieces.put_nowait), 0
        job.future.add_done_callback(lambda _: pieces.put_nowait(None))
        self._streams += 1
        try:
            while (piece := await pieces.get()) is not None:
                told += len(piece.tokens)
                yield piece
            whole = await job.future
        finally:
            self._streams -= 1
            if job.future.cancel():
                self._withdraw(job)
        rest = (whole.tokens[told:], whole.log_probs[told:], whole.finish_reason, whole.weight_versions[told:])
        yield GenerateResult(*rest, whole.routed_experts, whole.cached_tokens)

    def _submit(self, request: GenerateRequest, listener: Callable[[GenerateResult], None] | None = None) -> Job:
        self._check(request)
        limit = min(len(request.tokens) + request.sampling.max_new_tokens, self.budget.max_len)
        order = (-request.priority, next(self._arrivals))
        job = Job(request, self._future(), limit, order, list(request.tokens), listener=listener)
        self._loop_side.submit(partial(self._enter, job.future, partial(self.scheduler.submit, job)))
        return job

    def _withdraw(self, job: Job) -> None:
        self._loop_side.submit(partial(self.scheduler.abort, lambda other: other is job))

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        return await self._score(tokens, temperature)

    async def score_top(self, tokens: Sequence[int], k: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        if not 0 < k <= self.config.vocab_size:
            raise EngineError(f"torch engine: the {k} likeliest of {self.config.vocab_size} tokens were asked for")
        return await self._score(tokens, temperature, k)

    async def _score(self, tokens: Sequence[int], temperature: float, top: int = 0) -> Any:
        self._check_tokens(tokens, self.budget.max_len, "score")
        if temperature <= 0:
            raise EngineError(f"torch engine: scoring at temperature {temperature} is undefined; it must be above 0")
        job = ScoreJob(list(tokens), temperature, self._future(), top)
        self._loop_side.submit(partial(self._enter, job.future, partial(self.scheduler.scores.append, job)))
        return await job.future

    def _enter(self, future: asyncio.Future, enter: Callable[[], None]) -> None:
        """In the engine's thread: let a request in, if it can be served."""
        reason = f"it is asleep ({', '.join(sorted(self.asleep))})" if self.asleep else self.unusable
        if reason:
            self._outbox.append((future, EngineError(f"torch engine: {reason}")))
        else:
            enter()

    def _check(self, request: GenerateRequest) -> None:
        params = request.sampling
        self._check_tokens(request.tokens, self.budget.max_len - 1, f"request {request.id!r}")
        faults = {
            "carries images, but this engine takes text only": bool(request.multimodal),
            "asks for routed experts, but the model has none": request.routed_experts and not self.config.routes,
            f"has temperature {params.temperature}, which must not be negative": params.temperature < 0,
            f"has top_p {params.top_p}, which must be in (0, 1]": not 0 < params.top_p <= 1,
            f"has min_p {params.min_p}, which must be in [0, 1]": not 0 <= params.min_p <= 1,
            f"has max_new_tokens {params.max_new_tokens}, which must be at least 1": params.max_new_tokens < 1,
        }
        for fault, present in faults.items():
            if present:
                raise EngineError(f"torch engine: request {request.id!r} {fault}")
        for stop in params.stop:
            self.scheduler.watch.strings.check(stop)

    def _check_tokens(self, tokens: Sequence[int], most: int, what: str) -> None:
        if not 0 < len(tokens) <= most:
            raise EngineError(
                f"torch engine: {what} has {len(tokens)} tokens, must have 1 to {most}; the limit is the smallest of "
                "the model's max_position_embeddings, max_len and kv_cache_tokens"
            )
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise EngineError(f"torch engine: {what} has tokens outside the vocabulary [0, {self.config.vocab_size})")

    async def abort(self, request_id: str | None = None) -> None:
        await self._do(partial(self.scheduler.abort, lambda job: request_id in (None, job.request.id)))

    async def pause(self, mode: PauseMode = "retract") -> None:
        await self._do(partial(self.scheduler.pause, mode))

    async def resume(self) -> None:
        await self._do(self.scheduler.resume)

    async def flush_cache(self) -> None:
        await self._do(self.scheduler.flush)

    async def health(self) -> EngineHealth:
        self._check_alive()
        scheduler = self.scheduler
        running, waiting = scheduler.slots.count, len(scheduler.waiting)
        return EngineHealth(scheduler.version, running, waiting, self.asleep, this_process())

    # ---------------------------------------------------------------------------------------------------------- weights

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """Tensors are copied into place if nothing runs; otherwise into a second copy, which then replaces the first
        between two steps."""
        if transport not in self.accepts:
            known = ", ".join(sorted(self.accepts))
            raise WeightSyncError(f"torch engine: transport {transport!r} is not understood, only {known}")
        if await self._do(partial(self._load_if_idle, version, payload)):
            return
        staged = await asyncio.to_thread(self._stage, payload)
        await self._do(partial(self._commit, version, staged))

    async def checksums(self) -> Mapping[str, str]:
        """Of the weights that it holds, under checkpoint names."""
        return await self._do(lambda: checksums(self.loader.held()))

    def _load_if_idle(self, version: int, payload: Any) -> bool:
        if "weights" in self.asleep:
            raise WeightSyncError("torch engine: its weights are asleep; wake them before a weight sync")
        if self.scheduler.runnable:
            return False
        self._load(version, payload)
        return True

    def _load(self, version: int, payload: Any) -> None:
        def arriving() -> Iterator[WeightGroup]:
            for group in groups:
                self.unusable = f"the weight sync of version {version} did not complete; it holds a mixture"
                yield group

        with opened(payload, self.loader.held()) as groups:
            self.loader.load(arriving())
        self._serve_version(version)

    def _stage(self, payload: Any) -> dict[str, torch.Tensor]:
        with opened(payload, self.loader.held()) as groups:
            return self.loader.stage(groups)

    def _commit(self, version: int, staged: dict[str, torch.Tensor]) -> None:
        self.loader.commit(staged)
        self._serve_version(version)

    def _serve_version(self, version: int) -> None:
        self.scheduler.new_weights(version)
        self.unusable = None

    async def sleep(self, parts: frozenset[EnginePart]) -> None:
        await self._do(partial(self._sleep, frozenset(parts)))

    async def wake(self, parts: frozenset[EnginePart]) -> None:
        await self._do(partial(self._wake, frozenset(parts)))

    def _sleep(self, parts: frozenset[EnginePart]) -> None:
        """Weights move to the machine's memory, the cache is given up; on a CPU weights stay where they are."""
        parts -= self.asleep
        self.asleep |= parts
        self.scheduler.asleep = True
        if "kv_cache" in parts:
            self.scheduler.release()
        if parts & {"graphs", "weights"}:
            self.scheduler.arena.drop_graphs()
        if "weights" in parts and self.device.type == "cuda":
            self.parking.park(self.scheduler.decoder.weights.values())
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wake(self, parts: frozenset[EnginePart]) -> None:
        if "weights" in parts & self.asleep:
            self.parking.bring_back()
        self.asleep -= parts
        self.scheduler.asleep = bool(self.asleep)


def _tell(news: Sequence[tuple[Callable[[GenerateResult], None], GenerateResult]]) -> None:
    """In the event loop: hand pieces of streams to those who listen."""
    for listener, piece in news:
        listener(piece)
