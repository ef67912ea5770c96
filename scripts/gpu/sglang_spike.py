"""Spike: one SGLang 0.5.17 server behind `miles.protocols.RolloutEngine`, to learn what it forces on the protocol.

It attaches to a running server and speaks its HTTP API; docs/seams.md, section (c), says what came of it. What is
particular to SGLang, and therefore lives here and not in the protocol:

- One weight version is stamped on a whole reply, the one served when the reply was made. So `retract` is done here, by
  aborting and asking for the rest after `resume`: every piece then has one version, and the server is idle, which is
  the only state in which it can flush its cache. `in_place` needs streams, whose chunks are stamped one by one
  (and the token that was under way when the engine paused gets the new version although old weights made it).
- Aborting matches request ids by prefix. Ids sent here end in `$`, so none is a prefix of another.
- Several calls end the server process: a token outside the vocabulary (sent to a server without a tokenizer), a push
  that flushes or a sleep while requests are there, a tensor of the wrong shape. The first three are refused here.
- A push that fails half-way leaves some new and some old tensors. The engine then refuses requests until a push
  succeeds.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import httpx
import numpy as np

from miles.errors import EngineError
from miles.protocols import EngineHealth, EnginePart, PauseMode
from miles.types import GenerateRequest, GenerateResult

TAGS: dict[EnginePart, str] = {"weights": "weights", "kv_cache": "kv_cache", "graphs": "cuda_graph"}
ANY_TOP_K = (1 << 30) - 1
"""Larger than any vocabulary, yet not the value that SGLang reads as "no top_k"."""


@dataclass
class Piece:
    """What one HTTP request brought: part of a generation, all of it when nothing interrupted."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: str = ""
    routed_experts: str | None = None
    """base64 of int32 `[rows, layers, top_k]`."""
    cached_tokens: int = 0
    prompt_log_probs: list[float | None] = field(default_factory=list)

    def add(self, reply: dict[str, Any]) -> None:
        """Take in a reply, or one chunk of a stream of them."""
        meta = reply["meta_info"]
        finish = meta.get("finish_reason") or {}
        if finish.get("matched") == "NaN happened":
            raise EngineError("SGLang met a NaN in the logits and stopped the request; its weights are damaged")
        # Without `prompt_tokens` it is the echo of an abort in the queue, which repeats the last token of a stream.
        if not self.tokens or "prompt_tokens" in meta:
            scores = meta.get("output_token_sampling_logprobs")
            if scores is None:
                scores = [log_prob for log_prob, *_ in meta.get("output_token_logprobs", [])]
            if len(scores) != len(reply["output_ids"]):
                raise EngineError(f"SGLang sent {len(reply['output_ids'])} tokens with {len(scores)} log-probabilities")
            self.tokens += reply["output_ids"]
            self.log_probs += scores
            self.weight_versions += [int(meta["weight_version"])] * len(scores)
        self.finish_reason = finish.get("type", "")
        self.routed_experts = meta.get("routed_experts", self.routed_experts)
        self.cached_tokens = meta.get("cached_tokens", self.cached_tokens)
        self.prompt_log_probs = [p for p, *_ in meta.get("input_token_logprobs") or []] or self.prompt_log_probs


class SGLangSpike:
    """One server at `url`, of a model with `vocabulary` tokens. `routing` is `(layers, top_k)` of a mixture of experts
    whose choices are asked for. With `stream`, tokens come as they are made: the server then needs
    `--incremental-streaming-output`."""

    accepts = frozenset({"cuda_ipc", "disk"})
    generates = True

    def __init__(
        self,
        url: str,
        vocabulary: int,
        *,
        routing: tuple[int, int] | None = None,
        stream: bool = False,
        start_timeout: float = 300.0,
    ):
        self.vocabulary = vocabulary
        self.routing = routing
        self.stream = stream
        self.start_timeout = start_timeout
        # httpx looks at every idle connection for every request: with 256 of them the client is what limits the speed
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(None, connect=10), limits=limits)
        self._server: dict[str, Any] = {}
        self._version = 0
        self._running: set[str] = set()
        self._requests: set[str] = set()
        self._aborted: set[str] = set()
        self._asleep: frozenset[EnginePart] = frozenset()
        self._mode: PauseMode | None = None
        self._receiving = False
        self._unusable = ""
        self._changed = asyncio.Condition()
        self._sent = 0

    async def start(self) -> None:
        """Wait until the server answers, and read how it was started."""
        deadline = asyncio.get_running_loop().time() + self.start_timeout
        while True:
            with suppress(httpx.HTTPError):  # not listening yet
                if (await self._http.get("/health", timeout=30)).status_code == 200:
                    break
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(f"no SGLang server became healthy at {self._http.base_url} in {self.start_timeout} s")
            await asyncio.sleep(0.5)
        self._server = await self._get("/server_info")
        self._version = (await self.health()).weight_version
        if self.stream and not self._server.get("incremental_streaming_output"):
            raise EngineError("streams need a server started with --incremental-streaming-output")

    # ------------------------------------------------------------------------------------------------ requests

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self._refuse(request)
        whole, rows = Piece(), list[np.ndarray]()
        self._requests.add(request.id)
        try:
            while not whole.finish_reason:
                await self._admit(request.id)
                if request.id in self._aborted:
                    whole.finish_reason = "abort"
                    break
                piece = await self._send(self._payload(request, whole.tokens, sum(len(r) for r in rows)))
                whole.tokens += piece.tokens
                whole.log_probs += piece.log_probs
                whole.weight_versions += piece.weight_versions
                whole.cached_tokens = whole.cached_tokens or piece.cached_tokens
                if piece.routed_experts and self.routing:
                    chosen = np.frombuffer(base64.b64decode(piece.routed_experts), np.int32)
                    rows.append(chosen.reshape(-1, *self.routing))
                if len(whole.tokens) == request.sampling.max_new_tokens and piece.finish_reason == "abort":
                    whole.finish_reason = "length"
                elif not (piece.finish_reason == "abort" and self._resumes(request.id)):
                    whole.finish_reason = piece.finish_reason
        finally:
            self._requests.discard(request.id)
            self._aborted.discard(request.id)
        experts = np.concatenate(rows) if rows else None
        if experts is not None and len(experts) != len(request.tokens) + len(whole.tokens) - 1:
            experts = None  # aborted in the queue: SGLang sends the tokens it had, without their experts
        return GenerateResult(
            whole.tokens,
            whole.log_probs,
            cast(Literal["stop", "length", "abort"], whole.finish_reason),
            whole.weight_versions,
            experts,
            whole.cached_tokens,
        )

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        self._refuse_tokens(tokens)
        if temperature != 1.0:
            raise EngineError(
                f"SGLang scores given tokens at temperature 1 only, and {temperature} was asked for: "
                "score with the trainer's own forward pass instead"
            )
        payload = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        while True:
            await self._admit("")
            piece = await self._send(payload)
            if piece.finish_reason != "abort":
                break
        return np.asarray([p or 0.0 for p in piece.prompt_log_probs], np.float32)

    async def abort(self, request_id: str | None = None) -> None:
        self._aborted |= self._requests & {request_id} if request_id else self._requests
        await self._notify()
        while chosen := [rid for rid in self._running if request_id in (None, rid.rsplit(".", 1)[0])]:
            for rid in chosen:  # again and again: an abort that overtakes its request is forgotten by the server
                await self._post("/abort_request", {"rid": rid})
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------------------------------------ pausing

    async def pause(self, mode: PauseMode = "retract") -> None:
        if mode == "in_place" and not self.stream:
            raise EngineError("pausing in place needs streams: a whole reply carries one weight version for all tokens")
        self._mode = mode
        if mode == "in_place":
            await self._post("/pause_generation", {"mode": "in_place"})
            return
        while self._running:  # see `abort`
            await self._post("/abort_request", {"abort_all": True})
            await asyncio.sleep(0.02)

    async def resume(self) -> None:
        if self._mode == "in_place":
            await self._post("/continue_generation", {})
        self._mode = None
        await self._notify()

    async def flush_cache(self) -> None:
        await self._post("/flush_cache", {})

    async def sleep(self, parts: frozenset[EnginePart]) -> None:
        if not self._server.get("enable_memory_saver"):
            raise EngineError("the SGLang server was started without --enable-memory-saver: it cannot sleep")
        if self._running:
            raise EngineError(f"{len(self._running)} requests are running: pause (abort or retract) before sleep")
        if parts - self._asleep:
            await self._post("/release_memory_occupation", {"tags": [TAGS[p] for p in sorted(parts - self._asleep)]})
        self._asleep |= parts

    async def wake(self, parts: frozenset[EnginePart]) -> None:
        parts = parts & self._asleep
        if parts:
            await self._post("/resume_memory_occupation", {"tags": [TAGS[p] for p in sorted(parts)]})
        self._asleep -= parts
        if "weights" in parts and not self._server.get("enable_weights_cpu_backup"):
            self._unusable = "its weights were dropped while it slept and none were pushed since"

    # ------------------------------------------------------------------------------------------------ weights

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """`disk`: a checkpoint directory. `cuda_ipc`: buckets, sync or async, each a list with one base64 string a
        tensor-parallel rank, holding a pickled list of `(name, tensor)`. The next bucket is drawn when the one before
        it has been copied."""
        if self._running and self._mode != "in_place":
            raise EngineError(f"{len(self._running)} requests are running: pause the engine before a push")
        self._receiving = True
        try:
            if transport == "disk":
                await self._post("/update_weights_from_disk", {"model_path": str(payload), "flush_cache": False})
            elif transport == "cuda_ipc":
                async for bucket in _buckets(payload):
                    body = {"serialized_named_tensors": bucket, "flush_cache": False}
                    await self._post("/update_weights_from_tensor", body)
            else:
                raise EngineError(f"transport {transport!r} is not one of {', '.join(sorted(self.accepts))}")
            await self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            if self._mode != "in_place":
                await self.flush_cache()
        except BaseException as error:
            self._unusable = f"a push of version {version} failed half-way ({error})"
            raise
        finally:
            self._receiving = False
            await self._notify()
        self._version, self._unusable = version, ""

    async def health(self) -> EngineHealth:
        info, loads = await self._get("/model_info"), (await self._get("/v1/loads?include=core"))["loads"]
        running = sum(load["num_running_reqs"] for load in loads)
        waiting = sum(load["num_waiting_reqs"] for load in loads)
        return EngineHealth(int(info["weight_version"]), running, waiting, self._asleep)

    async def close(self) -> None:
        await self._http.aclose()

    # ------------------------------------------------------------------------------------------------ the wire

    def _resumes(self, request_id: str) -> bool:
        return self._mode == "retract" and request_id not in self._aborted

    def _refuse(self, request: GenerateRequest) -> None:
        """Requests that SGLang would answer wrongly, or die of."""
        self._refuse_tokens(request.tokens)
        if request.routed_experts and not (self.routing and self._server.get("enable_return_routed_experts")):
            raise EngineError("routed experts need a server started with --enable-return-routed-experts")
        if request.multimodal:
            raise EngineError("this spike sends no images")

    def _refuse_tokens(self, tokens: Sequence[int]) -> None:
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong or not tokens:
            raise EngineError(f"tokens must be at least one, each in [0, {self.vocabulary}); got {wrong or 'none'}")

    def _payload(self, request: GenerateRequest, done: list[int], experts_from: int) -> dict[str, Any]:
        sampling = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - len(done))
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": max(sampling.min_new_tokens - len(done), 0),
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        if self._server.get("enable_deterministic_inference"):
            params["sampling_seed"] = request.seed
        body: dict[str, Any] = {
            "input_ids": [*request.tokens, *done],
            "sampling_params": params,
            "return_logprob": True,
        }
        if sampling.truncates:
            body["return_sampling_mask"] = True
            params["top_k"] = sampling.top_k if sampling.top_k > 0 else ANY_TOP_K
        if request.routed_experts:
            body |= {"return_routed_experts": True, "routed_experts_start_len": experts_from}
        if self._server.get("enable_priority_scheduling"):
            body["priority"] = request.priority
        return body | {"rid": request.id, "stream": self.stream}

    async def _admit(self, request_id: str) -> None:
        """Wait while the engine is paused or being pushed to."""
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._mode or self._receiving) or request_id in self._aborted)
        if self._asleep or self._unusable:
            why = self._unusable or f"these parts of it are asleep: {', '.join(sorted(self._asleep))}"
            raise EngineError(f"the SGLang engine cannot serve requests: {why}")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _send(self, body: dict[str, Any]) -> Piece:
        self._sent += 1
        rid = f"{body.get('rid', 'score')}.{self._sent}$"
        body = body | {"rid": rid, "extra_key": str(self._version)}
        self._running.add(rid)
        piece = Piece()
        try:
            if not body.get("stream"):
                piece.add(await self._post("/generate", body))
            else:
                async for chunk in self._stream("/generate", body):
                    piece.add(chunk)
        finally:
            self._running.discard(rid)
        return piece

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._request("POST", path, json=body)

    async def _get(self, path: str) -> Any:
        return await self._request("GET", path)

    async def _request(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            reply = await self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise EngineError(f"SGLang at {self._http.base_url} did not answer {path}: {error!r}") from error
        return _parsed(path, reply.status_code, reply.text)

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._http.stream("POST", path, json=body) as reply:
                if reply.status_code != 200:
                    _parsed(path, reply.status_code, (await reply.aread()).decode())
                async for line in reply.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _parsed(path, 200, line[6:])
        except httpx.HTTPError as error:
            raise EngineError(f"SGLang at {self._http.base_url} broke off {path}: {error!r}") from error


def _parsed(path: str, status: int, text: str) -> Any:
    """A reply's JSON (its text where it is none), or an error that quotes what SGLang said."""
    try:
        reply = json.loads(text) if text else None
    except ValueError:
        reply = text
    failed = isinstance(reply, dict) and (reply.get("error") or reply.get("success") is False)
    if status != 200 or failed:
        raise EngineError(f"SGLang refused {path} ({status}): {text[:500]}")
    return reply


async def _buckets(payload: Iterable[list[str]] | AsyncIterable[list[str]]) -> AsyncIterator[list[str]]:
    if isinstance(payload, AsyncIterable):
        async for bucket in payload:
            yield bucket
    else:
        for bucket in payload:
            yield bucket
