"""`SGLangEngine`: SGLang servers behind the protocol of rollout engines.

What is particular to SGLang, and therefore stands here and not in the protocol:

- A reply carries one weight version, that of its end. So `retract` is done here, by aborting and asking for the rest
  after `resume`: every piece then has one version, and the servers are idle, which is the only state in which they can
  flush their caches. A push while they are paused `in_place` needs streams, whose chunks are stamped one by one; the
  token that was under way when they paused gets the new version although old weights made it.
- Draws go by seed and position, so the second piece of an answer goes on as the first would have; but only where the
  server runs with `--enable-deterministic-inference`, and otherwise a seed means nothing.
- Several calls end the server's process: a token outside the vocabulary; `min_p` with deterministic inference; memory
  that is released while requests run. They are refused here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miles.api import (
    EngineContext,
    EngineError,
    EngineHealth,
    EnginePart,
    GenerateRequest,
    GenerateResult,
    PauseMode,
    Routing,
    WeightSyncError,
)
from miles.toolkit import Shipment, this_process
from miles_sglang.affinity import Affinity
from miles_sglang.asking import Abilities, generation, refuse, refuse_tokens, scoring, scoring_next
from miles_sglang.client import Client, MalformedError, PassingError
from miles_sglang.external import RunningServer
from miles_sglang.fleet import LONG, Fleet
from miles_sglang.flights import Flight, Flights
from miles_sglang.launch import homes, own_servers
from miles_sglang.models import misread
from miles_sglang.options import ExternalOptions, SGLangOptions
from miles_sglang.replies import Answer, Piece
from miles_sglang.sender import Sender
from miles_sglang.standing import Standing
from miles_sglang.weights import Handles, hand_over

TAGS: dict[EnginePart, str] = {"weights": "weights", "kv_cache": "kv_cache", "graphs": "cuda_graph"}
IDLE = 30
"""Seconds for which a server waits to be idle before it flushes: it tells the end of a request before it has ended."""
CLOSING = 3.0
"""Seconds that requests have to end when the engine is closed."""
SCORING = "score"
"""As the id of a request that scores."""
MILES_SERVE = "miles serve"
"""What a server calls itself that speaks SGLang's API with an engine of miles behind it."""
NO_WEIGHTS = "no weights have arrived since it started: sync them first"

logger = logging.getLogger("miles")


class SGLangEngine:
    """Servers that it starts (`sglang`), or that run already (`sglang_external`)."""

    generates = True

    def __init__(self, options: SGLangOptions | ExternalOptions, *, context: EngineContext):
        self.options, self.context = options, context
        self.accepts = frozenset({"disk"} if self._external else {"inprocess", "broadcast", "disk"})
        self._vocabulary = int(context.hf_config.get_text_config().vocab_size)
        self._routing = Routing.of(context.hf_config)
        self._flights, self._standing, self._affinity = Flights(), Standing(), Affinity()
        self._can: Abilities | None = None
        self._crowded = False
        """Somebody was told that servers have more requests than graphs."""
        self._sender: Sender | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def _external(self) -> bool:
        return isinstance(self.options, ExternalOptions)

    @property
    def max_len(self) -> int | None:
        """Tokens of the longest sequence that its servers take; None before they have said it."""
        return self._can.max_len if self._can else None

    # ---------------------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Servers are started, or waited for, and asked what they can do."""
        self._sender = Sender(
            self._fleet(),
            self._flights,
            self._standing,
            self.options,
            vocabulary=self._vocabulary,
            alone=not self._external,
        )
        await self._begin(self._sender)
        self._standing.unusable = "" if self._external or self.context.load_weights else NO_WEIGHTS
        self._watch = asyncio.get_running_loop().create_task(self._sender.watch())

    def _fleet(self) -> Fleet:
        options, context = self.options, self.context
        if isinstance(options, SGLangOptions):
            return Fleet(Client(), *own_servers(options, context))
        client, patience = Client(os.environ.get(options.api_key_env)), options.start_timeout
        servers = [RunningServer(url, client, patience) for url in options.urls]
        return Fleet(client, servers, RunningServer(options.router, client, patience) if options.router else None)

    async def _begin(self, sender: Sender) -> None:
        await sender.fleet.start()
        infos = await sender.fleet.ask("/server_info")
        self._can, standing = Abilities.common([Abilities.of(i, self.context.hf_config) for i in infos]), self._standing
        sglang = any(info.get("server") != MILES_SERVE for info in infos)
        if sglang and (fault := misread(self.context.hf_config, self._can.max_len)):
            raise EngineError(f"SGLang engine: {fault}")
        if self.options.stream and not self._can.streams:
            raise EngineError("streams need servers that were started with --incremental-streaming-output")
        standing.version = await self._agreed_version(sender)
        standing.ended = standing.lost = ""
        standing.asleep = frozenset()

    async def _agreed_version(self, sender: Sender) -> int:
        """What all servers say; where that is no number, or not the same, they are called version 0 from here on."""
        versions = {str(info.get("weight_version")) for info in await sender.fleet.ask("/model_info")}
        if len(versions) == 1 and (version := versions.pop()).isdecimal():
            return int(version)
        await sender.fleet.tell("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
        return 0

    async def restart(self) -> None:
        """After an EngineLostError. Own servers are all started anew; those of somebody else are waited for."""
        sender, frozen = self._sender, self._flights.mode == "in_place"
        if sender is None or self._standing.ended:
            raise EngineError(f"the SGLang engine {self._standing.ended}")
        sender.lose("it is being started again")
        self._flights.mode = None
        await sender.fleet.stop()
        await self._begin(sender)
        self._standing.unusable = NO_WEIGHTS
        await self._flights.traffic.until(lambda: not self._flights.out, CLOSING)
        if frozen and self._external:
            await sender.tell("/continue_generation", {})

    async def close(self) -> None:
        """Requests under way end with an error, and servers hear that nobody waits for them any more."""
        self._standing.ended = "was closed"
        if self._watch:
            self._watch.cancel()
        if self._sender:
            await self._sender.close(CLOSING)

    def _there(self) -> tuple[Sender, Abilities]:
        """Raises EngineError when nothing can be asked of it, EngineLostError when a server is gone."""
        self._standing.check_there()
        assert self._sender is not None
        assert self._can is not None
        return self._sender, self._can

    # ------------------------------------------------------------------------------------------------ requests

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await self._generate(request, self.options.stream)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        """`generate` in pieces, as the tokens are made; in one piece where servers repeat what they said before (they
        were started without `--incremental-streaming-output`)."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        _, can = self._there()
        task = asyncio.get_running_loop().create_task(self._generate(request, can.streams, pieces.put_nowait))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                if piece.tokens:
                    yield GenerateResult(piece.tokens, piece.log_probs, "", [piece.version] * len(piece.tokens))
            whole = await task
        finally:
            task.cancel()
            await asyncio.wait([task])
        yield GenerateResult([], [], whole.finish_reason, [], whole.routed_experts, whole.cached_tokens)

    async def _generate(
        self, request: GenerateRequest, stream: bool, listener: Callable[[Piece], None] | None = None
    ) -> GenerateResult:
        sender, can = self._there()
        refuse(request, can, self._vocabulary, self._routing)
        answer = Answer(request, self._routing)
        most = min(request.sampling.max_new_tokens, can.max_len - len(request.tokens))

        def body() -> dict[str, Any]:
            answer.ask_on()
            return generation(answer, can, stream)

        def take(piece: Piece) -> None:
            answer.add(piece)
            if listener:
                listener(piece)

        with self._flights.one(request.id, self._affinity.key(request.id, request.tokens)) as flight:
            self._look_at_crowd(sender, can)
            while not answer.finish_reason:
                reason = await sender.send(flight, body, take)
                if reason == "abort" and len(answer.tokens) >= most:
                    reason = "length"
                if reason != "abort" or flight.aborted or not flight.retracted:
                    answer.finish_reason = reason
        return answer.result()

    def _look_at_crowd(self, sender: Sender, can: Abilities) -> None:
        """Nothing else tells that a server decodes without CUDA graphs: it is right, and slow."""
        if can.graphs is None or self._crowded or len(self._flights.all) <= can.graphs * len(sender.fleet.servers):
            return
        self._crowded = True
        logger.warning(
            "SGLang engine: more than %d requests at once for a server, and its CUDA graphs end there: a step of more "
            "may take several times as long, of a small model. Lower --rollout-concurrency, or raise %s",
            can.graphs,
            f"--{'' if self._external else 'sglang-'}cuda-graph-max-bs-decode",
        )

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """SGLang scores given tokens at temperature 1. At another one it is asked about each of them as the next token:
        as many requests as there are tokens, which share their beginnings in its cache."""
        _, can = self._there()
        refuse_tokens(tokens, self._vocabulary, can.max_len - 1)
        if not 0 < temperature < math.inf:
            raise EngineError(f"SGLang engine: temperature {temperature} is no distribution to score under")
        key = self._affinity.key(SCORING, tokens)
        if temperature == 1.0:
            piece = await self._scored(key, scoring(tokens), lambda piece: len(piece.prompt_log_probs) == len(tokens))
            return np.asarray(piece.prompt_log_probs, np.float32)
        bodies = (scoring_next(tokens[: end + 1], temperature) for end in range(1, len(tokens)))
        pieces = await asyncio.gather(
            *(self._scored(key, body, lambda piece: piece.next_log_prob is not None) for body in bodies)
        )
        return np.asarray([0.0, *(piece.next_log_prob for piece in pieces)], np.float32)

    async def _scored(self, key: str, body: dict[str, Any], complete: Callable[[Piece], bool]) -> Piece:
        """The answer to a request that scores, which says all that was asked."""
        (sender, _), taken = self._there(), Piece()

        def take(piece: Piece) -> None:
            nonlocal taken
            if piece.finish_reason != "abort" and not complete(piece):
                raise MalformedError("some of the scores that were asked for are missing")
            taken = piece

        with self._flights.one(SCORING, key) as flight:
            while await sender.send(flight, lambda: dict(body), take) == "abort":
                if flight.aborted or not flight.retracted:
                    raise EngineError("tokens to be scored were aborted")
        return taken

    async def abort(self, request_id: str | None = None) -> None:
        if self._standing.lost:
            return  # and everything with it
        sender, _ = self._there()
        flights = self._flights
        await self._end(sender, [flight for flight in flights.all if request_id in (None, flight.id)])

    async def _end(self, sender: Sender, chosen: Sequence[Flight]) -> None:
        """Abort these, and return when they have ended. Frozen servers go on meanwhile: they would not hear of it."""
        flights = self._flights
        thawed = flights.mode == "in_place" and not flights.receiving and any(flight.rid for flight in chosen)
        for flight in chosen:
            flight.aborted = True
        flights.gate.tell()
        if thawed:
            await sender.tell("/continue_generation", {})
        await sender.recall(lambda: [flight for flight in chosen if flight.rid])
        if thawed and flights.mode == "in_place":
            await sender.tell("/pause_generation", {"mode": "in_place"})
        await flights.traffic.until(lambda: flights.all.isdisjoint(chosen))

    # ------------------------------------------------------------------------------------------------- control

    async def pause(self, mode: PauseMode = "retract") -> None:
        (sender, _), flights = self._there(), self._flights
        was, flights.mode = flights.mode, mode
        if mode == "in_place":
            await sender.tell("/pause_generation", {"mode": "in_place"})
            return
        if was == "in_place":
            await sender.tell("/continue_generation", {})
        begun = [flight for flight in flights.all if flight.begun]
        for flight in begun:
            flight.retracted, flight.aborted = True, flight.aborted or mode == "abort"
        flights.gate.tell()
        await sender.recall(lambda: flights.out, every=True)
        if mode == "abort":
            await flights.traffic.until(lambda: flights.all.isdisjoint(begun))

    async def resume(self) -> None:
        (sender, _), flights = self._there(), self._flights
        if flights.mode == "in_place":
            await sender.tell("/continue_generation", {})
        flights.mode = None
        flights.gate.tell()

    async def flush_cache(self) -> None:
        """Servers flush when they are idle: what runs is put back for as long."""
        sender, _ = self._there()
        if self._flights.mode or not self._flights.out:
            await self._flush(sender)
            return
        await self.pause("retract")
        try:
            await self._flush(sender)
        finally:
            await self.resume()

    async def _flush(self, sender: Sender) -> None:
        await sender.tell(f"/flush_cache?timeout={IDLE}", {}, timeout=2 * IDLE)

    async def sleep(self, parts: frozenset[EnginePart]) -> None:
        (sender, can), standing = self._there(), self._standing
        if not can.sleeps:
            raise EngineError("the SGLang server was started without --enable-memory-saver: it cannot sleep")
        if out := self._flights.out:
            raise EngineError(f"{len(out)} requests are running: pause (abort or retract) before sleep")
        new = parts - standing.asleep
        if not new:
            return
        awake, standing.asleep = standing.asleep, standing.asleep | parts
        try:
            if "kv_cache" not in awake:
                await self._flush(sender)  # it also waits until the servers are idle: they die otherwise
            await self._move(sender, "/release_memory_occupation", new)
        except BaseException:
            standing.asleep = awake
            raise

    async def wake(self, parts: frozenset[EnginePart]) -> None:
        (sender, can), standing = self._there(), self._standing
        parts &= standing.asleep
        if not parts:
            return
        await self._move(sender, "/resume_memory_occupation", parts)
        if "weights" in parts and not can.keeps_weights:
            standing.unusable = "its weights were dropped while it slept, and none have arrived since"
        standing.asleep -= parts

    async def _move(self, sender: Sender, path: str, parts: frozenset[EnginePart]) -> None:
        """Raises EngineLostError when nobody knows whether it was done: done twice it ends a server."""
        try:
            await sender.tell(path, {"tags": [TAGS[part] for part in sorted(parts)]}, LONG, tries=1)
        except PassingError as error:
            sender.lose(f"{path} may have been done, or not: {error}")
            self._standing.check_there()
            raise
        except asyncio.CancelledError:
            sender.lose(f"{path} may have been done, or not: nobody waited for the answer")
            raise

    async def health(self) -> EngineHealth:
        """`weight_version` is -1 when a server holds others than were sent to it."""
        (sender, _), standing, flights = self._there(), self._standing, self._flights
        said = {str(info.get("weight_version")) for info in await sender.ask("/model_info")}
        version = standing.version if said == {str(standing.version)} else -1
        running, process = len(flights.out), "" if self._external else this_process()
        waiting = len(flights.all) - running
        return EngineHealth(version, running, waiting, standing.asleep, process, dict(sender.counts))

    # ------------------------------------------------------------------------------------------------- weights

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """Servers of somebody else read a checkpoint from disk; own ones get tensors from this process.

        Raises:
            WeightSyncError: it cannot receive this, or not now; it serves what it served.
            EngineError: the push failed: it serves nothing until another one succeeds.
        """
        (sender, _), standing, flights = self._there(), self._standing, self._flights
        if transport not in self.accepts:
            known = ", ".join(sorted(self.accepts))
            raise WeightSyncError(f"SGLang engine: transport {transport!r} is not understood, only {known}")
        if isinstance(payload, Shipment) and payload.changes:
            raise WeightSyncError(
                "SGLang engine: it takes whole weights, not changes, because SGLang does not give back what it holds: "
                "--update-weight-mode full"
            )
        if "weights" in standing.asleep:
            raise WeightSyncError("SGLang engine: its weights are asleep; wake them before a weight sync")
        if (out := flights.out) and not (flights.mode == "in_place" and self.options.stream):
            raise WeightSyncError(
                f"SGLang engine: {len(out)} requests are running: pause it (abort or retract) before a weight sync"
            )
        delivery = self._from_disk(sender, payload) if self._external else self._from_here(sender, payload)
        flights.receiving = True
        try:
            await delivery
            standing.coming = version
            label = {"new_version": str(version), "abort_all_requests": False}
            await sender.tell("/update_weight_version", label)
            if flights.mode != "in_place" and "kv_cache" not in standing.asleep:
                await self._flush(sender)
        except BaseException as error:
            standing.unusable = f"the weight sync of version {version} did not complete ({error})"
            raise
        else:
            standing.version, standing.unusable = version, ""
        finally:
            flights.receiving, standing.coming = False, None
            flights.gate.tell()

    def _from_disk(self, sender: Sender, payload: Any) -> Awaitable[None]:
        folder = payload.arguments.get("folder") if isinstance(payload, Shipment) else None
        if folder is None:
            raise WeightSyncError(f"SGLang engine: by disk it takes the folder of a checkpoint, not {payload!r}")
        body = {"model_path": str(Path(folder).absolute()), "flush_cache": False}  # servers run in other directories
        return sender.tell("/update_weights_from_disk", body, LONG, tries=1)

    async def _from_here(self, sender: Sender, payload: Any) -> None:
        async def post(handles: Handles) -> None:
            form = {"load_format": "flattened_bucket", "flush_cache": False}
            bodies = [{"serialized_named_tensors": of_one, **form} for of_one in handles]
            await sender.tell_each("/update_weights_from_tensor", bodies, LONG)

        await hand_over(payload, post, homes=homes(self.context, len(sender.fleet.servers)))
