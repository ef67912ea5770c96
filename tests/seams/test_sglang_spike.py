"""The SGLang spike against a small HTTP server that answers as SGLang 0.5.17 does.

`data/sglang_replies.json` holds replies of a real server, cut to a few tokens (scripts/gpu/seam_sglang.py records
them); the server here builds its own from the same keys. It stamps one weight version on a whole reply, aborts by
prefix of the request id and knows nothing of a request that has not arrived: what makes the real one hard to use.
"""

import asyncio
import base64
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from miles.errors import EngineError
from miles.protocols import RolloutEngine
from miles.types import GenerateRequest, SamplingParams

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "data" / "sglang_replies.json").read_text())
spec = importlib.util.spec_from_file_location("sglang_spike", HERE.parents[1] / "scripts" / "gpu" / "sglang_spike.py")
spike = sys.modules["sglang_spike"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spike)


class FakeSGLang(ThreadingHTTPServer):
    """Token `i` of a prompt of `n` is `100 + n + i`, its log-probability minus the weight version."""

    daemon_threads = True
    layers, top_k, seconds_a_token = 2, 2, 0.002

    def __init__(self, **flags):
        super().__init__(("127.0.0.1", 0), Handler)
        self.info = RECORDED["server_info"] | flags
        self.version, self.paused, self.fails = 0, False, False
        self.aborted: dict[str, bool] = {}
        self.calls: list[tuple[str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def called(self, path: str) -> list[dict]:
        return [body for name, body in self.calls if name == path]


class Handler(BaseHTTPRequestHandler):
    server: FakeSGLang

    def log_message(self, *args):
        """Keep the test's output clean."""

    def do_GET(self):
        path = self.path.split("?")[0]
        replies = {
            "/health": None,
            "/server_info": self.server.info,
            "/model_info": RECORDED["model_info"] | {"weight_version": str(self.server.version)},
            "/v1/loads": RECORDED["loads"],
        }
        self.reply(200, replies[path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.calls.append((self.path, body))
        if self.path == "/generate":
            self.generate(body)
        elif self.path == "/abort_request":
            for rid in server.aborted:
                if body.get("abort_all") or rid.startswith(body["rid"]):
                    server.aborted[rid] = True
            self.reply(200, None)
        elif self.path.startswith("/update_weights_from") and server.fails:
            self.reply(400, RECORDED["update"] | {"success": False, "message": "no such file"})
        elif self.path == "/update_weight_version":
            server.version = int(body["new_version"])
            self.reply(200, {"success": True, "new_version": body["new_version"]})
        elif self.path == "/flush_cache" and server.aborted:
            self.reply(400, None)
        else:
            server.paused = {"/pause_generation": True, "/continue_generation": False}.get(self.path, server.paused)
            self.reply(200, RECORDED["update"] if "update" in self.path else None)

    def generate(self, body: dict) -> None:
        server, prompt, rid = self.server, body["input_ids"], body["rid"]
        server.aborted[rid] = False
        tokens, log_probs, finish = [], [], {"type": "length", "length": body["sampling_params"]["max_new_tokens"]}
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
        while len(tokens) < body["sampling_params"]["max_new_tokens"]:
            time.sleep(server.seconds_a_token)
            if server.paused:
                continue
            tokens.append(100 + len(prompt) + len(tokens))
            log_probs.append([-float(server.version), tokens[-1], None])
            if server.aborted[rid]:
                finish = RECORDED["abort"]["meta_info"]["finish_reason"]
                break
            if body.get("stream"):
                self.chunk(body, tokens[-1:], log_probs[-1:], None)
        del server.aborted[rid]
        if body.get("stream"):
            self.chunk(body, [], [], finish)
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.reply(200, self.answer(body, tokens, log_probs, finish))

    def chunk(self, *answer) -> None:
        self.wfile.write(b"data: " + json.dumps(self.answer(*answer)).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, body: dict, tokens: list, log_probs: list, finish: dict | None) -> dict:
        meta = RECORDED["length"]["meta_info"] | {
            "id": body["rid"],
            "finish_reason": finish,
            "weight_version": str(self.server.version),
            "output_token_logprobs": log_probs,
        }
        if body.get("logprob_start_len") == 0:
            given = body["input_ids"]
            meta["input_token_logprobs"] = [[-0.5 * i if i else None, t, None] for i, t in enumerate(given)]
        if body.get("return_routed_experts"):
            positions = np.arange(body["routed_experts_start_len"], len(body["input_ids"]) + len(tokens) - 1)
            shape = (len(positions), self.server.layers, self.server.top_k)
            rows = np.broadcast_to(positions[:, None, None], shape).astype(np.int32)
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return {"output_ids": tokens, "meta_info": meta}

    def reply(self, status: int, content) -> None:
        text = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    yield from serve(
        FakeSGLang(
            skip_tokenizer_init=True,
            enable_memory_saver=True,
            enable_return_routed_experts=True,
            enable_deterministic_inference=True,
            incremental_streaming_output=False,
        )
    )


def serve(fake: FakeSGLang) -> Iterator[FakeSGLang]:
    thread = threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def ask(id: str = "1", prompt: int = 3, length: int = 4, **kwargs) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=length, **kwargs.pop("sampling", {}))
    return GenerateRequest(id, list(range(10, 10 + prompt)), sampling, **kwargs)


def run(server: FakeSGLang, story, **options):
    """Run `await story(engine)` with a started engine."""

    async def whole():
        engine = spike.SGLangSpike(server.url, 1024, routing=(2, 2), start_timeout=5, **options)
        await engine.start()
        try:
            return await asyncio.wait_for(story(engine), 20)
        finally:
            await engine.close()

    return asyncio.run(whole())


def piece(name: str):
    found = spike.Piece()
    found.add(RECORDED[name])
    return found


# ------------------------------------------------------------------------------------------- replies of a real server


def test_a_recorded_generation_has_a_log_prob_and_a_version_for_each_token():
    reply, found = RECORDED["length"], piece("length")
    assert found.tokens == reply["output_ids"] == [row[1] for row in reply["meta_info"]["output_token_logprobs"]]
    assert found.log_probs == [row[0] for row in reply["meta_info"]["output_token_logprobs"]]
    assert found.weight_versions == [int(reply["meta_info"]["weight_version"])] * len(found.tokens)
    assert found.finish_reason == "length"


def test_a_recorded_stop_keeps_the_stop_token():
    assert piece("stop").finish_reason == "stop"
    assert piece("stop").tokens[-1] == RECORDED["stop"]["meta_info"]["finish_reason"]["matched"]


def test_recorded_truncated_sampling_reads_the_log_probs_of_the_truncated_distribution():
    meta = RECORDED["top_p"]["meta_info"]
    assert piece("top_p").log_probs == meta["output_token_sampling_logprobs"]
    assert all(
        cut >= full for cut, (full, *_) in zip(piece("top_p").log_probs, meta["output_token_logprobs"], strict=True)
    )


def test_recorded_prompt_scores_begin_with_none():
    scores = piece("score").prompt_log_probs
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])


def test_recorded_experts_have_one_row_fewer_than_tokens():
    reply = RECORDED["experts"]
    rows = np.frombuffer(base64.b64decode(piece("experts").routed_experts), np.int32).reshape(-1, 4, 4)
    assert len(rows) == reply["meta_info"]["prompt_tokens"] + len(reply["output_ids"]) - 1
    assert rows.min() >= 0
    assert rows.max() < 16
    assert all(len(set(chosen)) == 4 for chosen in rows.reshape(-1, 4).tolist())


def test_recorded_aborts_return_what_there_was():
    for name in ("abort", "abort queued"):
        assert piece(name).finish_reason == "abort"
        assert len(piece(name).tokens) == len(piece(name).log_probs) > 0


def test_a_recorded_stream_adds_up_to_the_whole_answer():
    whole = spike.Piece()
    for line in RECORDED["stream"].splitlines():
        if line.startswith("data: {"):
            whole.add(json.loads(line[6:]))
    assert len(whole.tokens) == len(whole.log_probs) == len(whole.weight_versions) == 3
    assert whole.finish_reason == "length"


@pytest.mark.parametrize(("name", "quoted"), [("stop string", "skip_tokenizer_init"), ("too long", "8192 tokens")])
def test_a_recorded_refusal_is_quoted(name, quoted):
    with pytest.raises(EngineError, match=quoted):
        spike._parsed("/generate", *RECORDED[name])


def test_nan_logits_are_an_error_although_sglang_calls_them_a_stop():
    reply = {"output_ids": [], "meta_info": {"finish_reason": {"type": "stop", "matched": "NaN happened"}}}
    with pytest.raises(EngineError, match="NaN"):
        spike.Piece().add(reply)


# ---------------------------------------------------------------------------------------------------------- requests


def test_it_satisfies_the_protocol(server):
    assert isinstance(spike.SGLangSpike(server.url, 1024), RolloutEngine)


def test_generate_sends_tokens_and_returns_tokens(server):
    result = run(server, lambda engine: engine.generate(ask(seed=5, sampling={"temperature": 0.5, "top_k": 9})))
    assert result.tokens == [103, 104, 105, 106]
    assert result.weight_versions == [0] * 4
    assert result.finish_reason == "length"
    (body,) = server.called("/generate")
    assert body["input_ids"] == [10, 11, 12]
    assert body["sampling_params"]["sampling_seed"] == 5
    assert body["sampling_params"]["top_k"] == 9
    assert body["return_sampling_mask"] is True


def test_experts_cover_every_position_but_the_last(server):
    rows = run(server, lambda engine: engine.generate(ask(routed_experts=True))).routed_experts
    assert rows[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest("1", [5, 1024], SamplingParams()), "1024"),
        (GenerateRequest("1", [], SamplingParams()), "at least one"),
        (ask(multimodal={"pixel_values": 1}), "images"),
    ],
)
def test_requests_that_would_end_the_server_or_lose_something_are_refused(server, request_, message):
    with pytest.raises(EngineError, match=message):
        run(server, lambda engine: engine.generate(request_))
    assert server.called("/generate") == []


def test_score_reads_the_prompt_and_refuses_another_temperature(server):
    scores = run(server, lambda engine: engine.score([7, 8, 9]))
    assert scores.tolist() == [0.0, -0.5, -1.0]
    assert scores.dtype == np.float32
    with pytest.raises(EngineError, match="temperature"):
        run(server, lambda engine: engine.score([7, 8], temperature=0.5))


def test_abort_reaches_one_request_even_where_its_id_begins_another(server):
    async def story(engine):
        tasks = [asyncio.create_task(engine.generate(ask(id, length=60))) for id in ("1", "10")]
        await asyncio.sleep(0.05)
        await engine.abort("1")
        return await asyncio.gather(*tasks)

    one, ten = run(server, story)
    assert one.finish_reason == "abort"
    assert 0 < len(one.tokens) < 60
    assert len(one.log_probs) == len(one.tokens)
    assert (ten.finish_reason, len(ten.tokens)) == ("length", 60)


def test_an_abort_that_overtakes_its_request_still_ends_it(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=2000)))
        await asyncio.sleep(0)  # the request is on its way, and not at the server yet
        await engine.abort()
        return await task

    assert run(server, story).finish_reason == "abort"


# ------------------------------------------------------------------------------------------------ pausing and weights


def test_retract_continues_under_the_new_weights_and_stamps_each_token(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=80, routed_experts=True)))
        await asyncio.sleep(0.06)
        await engine.pause("retract")
        await engine.receive("disk", 1, "checkpoint")
        await engine.resume()
        return await task

    result = run(server, story)
    switch = result.weight_versions.index(1)
    assert 0 < switch < 80
    assert result.weight_versions == [0] * switch + [1] * (80 - switch)
    assert result.log_probs == [-float(v) for v in result.weight_versions]
    assert result.tokens == list(range(103, 183))
    assert result.routed_experts[:, 0, 0].tolist() == list(range(82))
    assert result.finish_reason == "length"
    first, second = server.called("/generate")
    assert second["input_ids"] == first["input_ids"] + result.tokens[:switch]
    assert (first["extra_key"], second["extra_key"]) == ("0", "1")


def test_in_place_needs_a_stream_and_stamps_each_chunk():
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=60)))
        await asyncio.sleep(0.05)
        await engine.pause("in_place")
        await engine.receive("disk", 1, "checkpoint")
        await engine.resume()
        return await task

    for fake in serve(FakeSGLang(incremental_streaming_output=True)):
        result = run(fake, story, stream=True)
        switch = result.weight_versions.index(1)
        assert 0 < switch < 60
        assert result.weight_versions == [0] * switch + [1] * (60 - switch)
        assert len(fake.called("/generate")) == 1
        assert fake.called("/flush_cache") == []
    for fake in serve(FakeSGLang(incremental_streaming_output=False)):
        with pytest.raises(EngineError, match="needs streams"):
            run(fake, lambda engine: engine.pause("in_place"))
        with pytest.raises(EngineError, match="incremental-streaming-output"):
            run(fake, lambda engine: engine.health(), stream=True)


def test_requests_wait_while_paused_and_an_abort_frees_them(server):
    async def story(engine):
        await engine.pause("abort")
        waiting = asyncio.create_task(engine.generate(ask("1")))
        freed = asyncio.create_task(engine.generate(ask("2")))
        await asyncio.sleep(0.05)
        assert server.called("/generate") == []
        await engine.abort("2")
        early = await freed
        await engine.resume()
        return early, await waiting

    early, late = run(server, story)
    assert (early.finish_reason, early.tokens) == ("abort", [])
    assert late.finish_reason == "length"


def test_a_push_sends_buckets_one_by_one_then_the_version_then_flushes(server):
    async def buckets():
        for name in ("a", "b"):
            yield [name]

    async def story(engine):
        await engine.receive("cuda_ipc", 3, buckets())
        return await engine.health()

    assert run(server, story).weight_version == 3
    assert [path for path, _ in server.calls] == [
        "/update_weights_from_tensor",
        "/update_weights_from_tensor",
        "/update_weight_version",
        "/flush_cache",
    ]
    assert [b["serialized_named_tensors"] for b in server.called("/update_weights_from_tensor")] == [["a"], ["b"]]


def test_a_failed_push_makes_the_engine_refuse_until_one_succeeds(server):
    async def story(engine):
        server.fails = True
        with pytest.raises(EngineError, match="no such file"):
            await engine.receive("disk", 1, "checkpoint")
        with pytest.raises(EngineError, match="failed half-way"):
            await engine.generate(ask())
        server.fails = False
        await engine.receive("disk", 1, "checkpoint")
        return await engine.generate(ask())

    assert run(server, story).weight_versions == [1] * 4


def test_a_push_to_a_running_engine_is_refused(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=50)))
        await asyncio.sleep(0.02)
        with pytest.raises(EngineError, match="pause the engine"):
            await engine.receive("disk", 1, "checkpoint")
        return await task

    assert run(server, story).weight_versions == [0] * 50


def test_sleeping_by_parts_and_waking_without_weights(server):
    async def story(engine):
        await engine.sleep(frozenset({"weights", "kv_cache"}))
        await engine.sleep(frozenset({"kv_cache"}))
        with pytest.raises(EngineError, match="kv_cache"):
            await engine.generate(ask())
        await engine.wake(frozenset({"weights", "kv_cache", "graphs"}))
        with pytest.raises(EngineError, match="dropped while it slept"):
            await engine.generate(ask())
        await engine.receive("disk", 1, "checkpoint")
        return await engine.generate(ask())

    assert run(server, story).weight_versions == [1] * 4
    assert server.called("/release_memory_occupation") == [{"tags": ["kv_cache", "weights"]}]
    assert server.called("/resume_memory_occupation") == [{"tags": ["kv_cache", "weights"]}]
