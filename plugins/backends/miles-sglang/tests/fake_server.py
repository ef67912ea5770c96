"""A small server that answers as SGLang 0.5.17 does, and keeps what it was told.

`data/sglang_replies.json` holds replies of a real one, cut to a few tokens (scripts/gpu/seam_sglang.py records them);
this one builds its own from the same keys. It stamps one weight version on a whole reply, aborts by prefix of the
request id, knows nothing of a request that has not arrived and minds calls that it gets while requests run: what makes
the real one hard to use.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from aiohttp import web

from miles.api import EngineContext

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "sglang_replies.json").read_text())
ABLE = {
    "skip_tokenizer_init": True,
    "enable_memory_saver": True,
    "enable_return_routed_experts": True,
    "enable_deterministic_inference": True,
    "incremental_streaming_output": True,
    "enable_priority_scheduling": True,
    "context_length": 4096,
}
LAYERS, TOP_K, EXPERTS, VOCABULARY = 2, 2, 128, 1024


def context(**others: Any) -> EngineContext:
    """Of a mixture of experts with as many words as the fake server knows."""
    config = SimpleNamespace(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=4096,
    )
    config.get_text_config = lambda: config
    given = {"checkpoint": Path("tiny"), "run_dir": Path("run"), "device": "cpu", "dtype": "fp32", "load_weights": True}
    return EngineContext(hf_config=config, tokenizer=None, bridge=None, **given | others)


class FakeSGLang:
    """Token `i` of a prompt of `n` is `100 + n + i`, its log-probability minus the weight version."""

    seconds_a_token = 0.002

    def __init__(self, **flags: Any):
        self.info = RECORDED["server_info"] | ABLE | flags
        self.version: Any = "0"
        self.paused = self.fails = self.hangs = False
        self.spoils: list[dict[str, Any]] = []
        """Replaces parts of the next answers' `meta_info`."""
        self.breaks: set[str] = set()
        """Paths at which it breaks off after it has done what was asked."""
        self.aborted: dict[str, bool] = {}
        """Requests that it has: whether they were aborted."""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.url = ""

    def called(self, path: str) -> list[dict[str, Any]]:
        return [body for name, body in self.calls if name == path]

    async def get(self, request: web.Request) -> web.Response:
        if self.hangs and request.path == "/server_info":
            await asyncio.sleep(60)
        replies = {
            "/health": None,
            "/server_info": self.info,
            "/model_info": RECORDED["model_info"] | {"weight_version": self.version},
        }
        return _reply(200, replies[request.path])

    async def post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        path = request.path
        self.calls.append((path, body))
        if self.hangs and path == "/pause_generation":
            await asyncio.sleep(60)
        if path == "/generate":
            return await self.generate(request, body)
        if path == "/abort_request":
            for rid in self.aborted:
                self.aborted[rid] |= bool(body.get("abort_all")) or rid.startswith(body["rid"])
            return _reply(200, None)
        if path.startswith("/update_weights_from") and self.fails:
            return _reply(400, RECORDED["update"] | {"success": False, "message": "no such file"})
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return _reply(200, {"success": True, "new_version": body["new_version"]})
        if path == "/flush_cache" and self.aborted:
            return _reply(400, None)
        if path in self.breaks:
            request.transport.abort()
        assert path != "/release_memory_occupation" or not self.aborted, "the scheduler is not idle"
        self.paused = {"/pause_generation": True, "/continue_generation": False}.get(path, self.paused)
        return _reply(200, RECORDED["update"] if "update" in path else None)

    async def generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        rid, most = body["rid"], body["sampling_params"]["max_new_tokens"]
        seeded = self.info["enable_deterministic_inference"]
        assert not (seeded and body["sampling_params"].get("min_p")), "multinomial_with_seed, and the scheduler ends"
        self.aborted[rid] = False
        stream = web.StreamResponse()
        if body.get("stream"):
            await stream.prepare(request)
        tokens, finish = [], {"type": "length", "length": most}
        try:
            while len(tokens) < most:
                await asyncio.sleep(self.seconds_a_token)
                if self.paused or self.hangs:
                    continue
                tokens.append(100 + len(body["input_ids"]) + len(tokens))
                if self.aborted[rid]:
                    finish = RECORDED["abort"]["meta_info"]["finish_reason"]
                    break
                if body.get("stream"):
                    await stream.write(_event(self.answer(body, tokens, None, last=1)))
        finally:
            del self.aborted[rid]
        if not body.get("stream"):
            return _reply(200, self.answer(body, tokens, finish))
        await stream.write(_event(self.answer(body, tokens, finish, last=0)) + b"data: [DONE]\n\n")
        return stream

    def answer(
        self, body: dict[str, Any], tokens: list[int], finish: dict[str, Any] | None, last: int | None = None
    ) -> dict[str, Any]:
        """With all tokens, or the `last` of them."""
        told = tokens if last is None else tokens[len(tokens) - last :]
        meta = RECORDED["length"]["meta_info"] | {
            "id": body["rid"],
            "finish_reason": finish,
            "weight_version": self.version,
            "output_token_logprobs": [[-float(self.version), token, None] for token in told],
        }
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_logprobs"] = [-0.25] * len(told)
        if body.get("logprob_start_len") == 0:
            given = body["input_ids"]
            meta["input_token_logprobs"] = [[-0.5 * i if i else None, t, None] for i, t in enumerate(given)]
        if asked := body.get("token_ids_logprob"):
            at = body["sampling_params"]["temperature"]
            meta["output_token_ids_logprobs"] = [[[-0.5 * len(body["input_ids"]) / at, t, None] for t in asked]]
        if body.get("return_routed_experts") and finish is not None:
            positions = np.arange(body["routed_experts_start_len"], len(body["input_ids"]) + len(tokens) - 1)
            rows = np.broadcast_to(positions[:, None, None], (len(positions), LAYERS, TOP_K)).astype(np.int32)
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        spoilt = self.spoils.pop(0) if self.spoils else {}
        return {"output_ids": told, "meta_info": meta | spoilt}


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _reply(status: int, content: Any) -> web.Response:
    return web.Response(status=status, body=b"" if content is None else json.dumps(content).encode())


@asynccontextmanager
async def listening(*fakes: FakeSGLang) -> AsyncIterator[None]:
    """They answer at their `url`."""
    runners = []
    for fake in fakes:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/{path:.*}", fake.get)
        app.router.add_post("/{path:.*}", fake.post)
        runners.append(runner := web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{site.port}"
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()
