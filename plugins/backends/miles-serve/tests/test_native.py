"""What `miles serve` makes of SGLang's API where SGLang itself does otherwise, or not at all."""

import asyncio
import base64
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from miles.api import EngineError, EngineLostError

RECORDED = json.loads((Path(__file__).parents[2] / "miles-sglang/tests/data/sglang_replies.json").read_text())
"""Replies of a real SGLang 0.5.17."""
GREEDY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


def body(tokens=(5, 6, 7), **more):
    return {"input_ids": list(tokens), "sampling_params": GREEDY, "return_logprob": True, **more}


async def arrived(server, requests):
    """As many have come to the server, into the engine or to wait outside."""
    traffic = server.service.traffic
    while len(traffic.underway) + len(traffic._outside) < requests:
        await asyncio.sleep(0.002)


@pytest.fixture(scope="module")
def experts(lab):
    with lab.serving(model_type="qwen3_moe") as server:
        yield server


def test_expert_choices_are_int32_rows_from_where_asked(experts):
    reply = experts.client.post("/generate", body(return_routed_experts=True)).json
    rows = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), "<i4").reshape(-1, 2, 2)
    assert rows.shape[0] == 3 + 6 - 1
    assert 0 <= rows.min() <= rows.max() < 4
    late = experts.client.post("/generate", body(return_routed_experts=True, routed_experts_start_len=3)).json
    late_rows = np.frombuffer(base64.b64decode(late["meta_info"]["routed_experts"]), "<i4").reshape(-1, 2, 2)
    np.testing.assert_array_equal(late_rows, rows[3:])
    events = experts.client.post("/generate", body(return_routed_experts=True, stream=True)).events
    assert ["routed_experts" in event["meta_info"] for event in events[:-1]] == [False] * (len(events) - 2) + [True]
    assert events[-2]["meta_info"]["routed_experts"] == reply["meta_info"]["routed_experts"]


def test_a_dense_model_has_no_experts_to_return(shared):
    reply = shared.client.post("/generate", body(return_routed_experts=True))
    assert (reply.status, "experts" in reply.text) == (400, True)


def shape(value):
    """A reply without what it says: fields and types, of lists that of the last entry. Whole numbers stand for any."""
    if isinstance(value, dict):
        return {name: shape(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [shape(value[-1])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [
        ("length", {}),
        ("score", {"sampling_params": {"max_new_tokens": 0}, "logprob_start_len": 0}),
        ("stop", {"sampling_params": {"max_new_tokens": 200, "stop_token_ids": list(range(320))}}),
    ],
)
def test_replies_have_the_fields_of_recorded_ones(shared, recorded, asked):
    expected, found = shape(RECORDED[recorded]), shape(shared.client.post("/generate", body(**asked)).json)
    assert found["output_ids"] == expected["output_ids"]
    assert expected["meta_info"].items() <= found["meta_info"].items()


def test_pieces_have_the_fields_of_recorded_ones(shared):
    *pieces, _ = shared.client.post("/generate", body(stream=True)).events
    *expected, done = [line.removeprefix("data: ") for line in RECORDED["stream"].split("\n\n") if line]
    assert done == "[DONE]"
    for piece, recorded in ((pieces[0], expected[0]), (pieces[-1], expected[-1])):
        known = shape(json.loads(recorded))["meta_info"]
        known.pop("response_sent_to_client_ts", None)
        assert known.items() <= shape(piece)["meta_info"].items()


@pytest.mark.parametrize("what", ["model_info", "server_info", "loads"])
def test_the_server_says_the_fields_of_recorded_ones(shared, what):
    path = {"loads": "/v1/loads?include=core"}.get(what, f"/{what}")
    told = shared.client.get(path).json
    left_out = {"accelerator", "num_accelerators"}  # of the machine
    assert RECORDED[what].keys() - left_out <= told.keys()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"sampling_params": {"frequency_penalty": 0.5}}, "frequency_penalty"),
        ({"sampling_params": {"regex": "a+"}}, "regex"),
        ({"sampling_params": {"logit_bias": {"5": 1.0}}}, "logit_bias"),
        ({"sampling_params": {"tempperature": 1.0}}, "tempperature"),
        ({"sampling_params": {"stop": ""}}, "stop"),
        ({"sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"image_data": "x.png"}, "image_data"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"top_logprobs_num": 2}, "prompts only"),
        ({"top_logprobs_num": -1}, "top_logprobs_num"),
        ({"token_ids_logprob": [5]}, "one generated token"),
        ({"logprob_start_len": 4}, "logprob_start_len"),
        ({"return_logprob": [True, False]}, "return_logprob"),
        ({"text": "both"}, "not both"),
    ],
)
def test_what_would_be_ignored_in_silence_is_refused(shared, more, named):
    reply = shared.client.post("/generate", body(**more))
    assert reply.status == 400
    assert named in reply.json["error"]["message"]


def test_a_fault_is_named_once(shared):
    for more, said in (
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature: Input should be greater than"),
        ({"input_ids": ["a"] * 50_000}, "input_ids.0: Input should be a valid integer."),
    ):
        message = shared.client.post("/generate", body(**more)).json["error"]["message"]
        assert message.startswith(said)
        assert len(message) < 120


def test_neutral_values_are_no_wishes(shared):
    neutral = {"frequency_penalty": 0.0, "repetition_penalty": 1.0, "json_schema": None, "regex": "", "logit_bias": {}}
    params = {**GREEDY, **neutral, "top_k": 1 << 30, "min_p": None}
    assert shared.client.post("/generate", body(sampling_params=params)).status == 200


def test_prompts_are_scored_at_a_temperature(shared, lab):
    """And the reply confirms it, which is how a client knows that it was understood."""
    tokens = [5, 17, 3, 200, 9]
    asked = body(tokens, logprob_start_len=0, input_logprob_temperature=0.5)
    asked["sampling_params"] = {"max_new_tokens": 0}
    meta = shared.client.post("/generate", asked).json["meta_info"]
    assert meta["input_logprob_temperature"] == 0.5
    expected = lab.tiny.log_probs_of(lab.tiny.model(lab.tiny.hf_config("llama")), tokens, 0.5)
    found = [value for value, *_ in meta["input_token_logprobs"]]
    np.testing.assert_allclose(found[1:], expected[1:], atol=2e-4)


def test_log_probs_can_carry_their_text(shared):
    reply = shared.client.post("/generate", body([72, 73], return_text_in_logprobs=True, logprob_start_len=0)).json
    tokenizer = shared.service.tokenizer
    assert [row[2] for row in reply["meta_info"]["input_token_logprobs"]] == [tokenizer.decode([t]) for t in (72, 73)]


def test_streams_hold_everything_so_far_unless_asked_otherwise(shared):
    whole = shared.client.post("/generate", body()).json
    *pieces, done = shared.client.post("/generate", body(stream=True)).events
    assert done == "[DONE]"
    lengths = [len(piece["output_ids"]) for piece in pieces]
    assert lengths == sorted(set(lengths))
    assert (pieces[-1]["output_ids"], pieces[-1]["text"]) == (whole["output_ids"], whole["text"])


def test_seeds_of_n_answers_differ(shared):
    params = {"max_new_tokens": 8, "n": 3, "sampling_seed": 5}
    drawn = [shared.client.post("/generate", body(sampling_params=params)).json for _ in range(2)]
    first, second = ([reply["output_ids"] for reply in replies] for replies in drawn)
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 3


def test_the_rest_of_the_context_is_used_when_no_length_is_given(shared):
    params = {"max_new_tokens": None, "ignore_eos": True}
    reply = shared.client.post("/generate", body([1] * 250, sampling_params=params)).json
    assert len(reply["output_ids"]) == 256 - 250
    reply = shared.client.post("/generate", body([1] * 250, sampling_params={"ignore_eos": True})).json
    assert len(reply["output_ids"]) == 256 - 250


def test_no_pickles(shared):
    reply = shared.client.post("/update_weights_from_tensor", {"serialized_named_tensors": ["gASV"]})
    assert reply.status == 400
    assert "update_weights_from_disk" in reply.text


def test_a_key_is_asked_for(lab):
    with lab.serving(api_key="sesame") as server:
        assert server.client.get("/health").status == 200
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "sesame"}):
            for path in ("/model_info", "/v1/models"):
                assert lab.Client(server.url, headers).get(path).status == 401
        assert lab.Client(server.url, {"Authorization": "Bearer sesame"}).get("/model_info").status == 200


def test_a_page_of_another_site_gets_nothing_done(lab, shared):
    """A browser says whose page asks, and sends such requests without asking anybody."""
    foreign = lab.Client(shared.url, {"Origin": "http://elsewhere.example"})
    for path in ("/flush_cache", "/generate", "/v1/completions"):
        assert foreign.post(path, {}).status == 403
    assert lab.Client(shared.url, {"Origin": shared.url}).get("/model_info").status == 200


class Failing:
    """An engine that fails as it is told."""

    accepts = frozenset({"disk"})
    generates = True

    def __init__(self, error):
        self.error = error

    async def fail(self, *arguments):
        raise self.error

    generate = score = receive = health = flush_cache = fail

    async def close(self): ...


@pytest.mark.parametrize(
    ("error", "status"),
    [(EngineError("its weights are a mixture"), 503), (EngineLostError("it is gone"), 503), (KeyError("a bug"), 500)],
)
def test_an_engine_that_fails_is_not_the_clients_fault(playing, tmp_path, error, status):
    server = playing(Failing(error))
    for path in ("/generate", "/flush_cache"):
        reply = server.client.post(path, body())
        assert reply.status == status
        assert ("bug" in reply.text) is False  # what it was is for the log
    (tmp_path / "model.safetensors").write_bytes(b"")
    moved = server.client.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert moved.status == (400 if isinstance(error, EngineError) else 500)
    if isinstance(error, EngineError):
        assert server.client.get("/health").status == 503


def test_an_update_waits_for_requests_and_requests_for_it(lab, tmp_path):
    other = lab.tiny.checkpoint(tmp_path, lab.tiny.hf_config("llama"), 1)
    with lab.serving() as server:
        gate, engine = threading.Event(), server.service.engine
        generate = engine.generate

        async def slow(request):
            while not gate.is_set():
                await asyncio.sleep(0.005)
            return await generate(request)

        engine.generate = slow

        async def work(session):
            moving = {"model_path": str(other), "weight_version": "7"}
            first = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body()))
            await arrived(server, 1)
            update = asyncio.ensure_future(lab.ask(session, "POST", "/update_weights_from_disk", json=moving))
            while not server.service.traffic._busy:
                await asyncio.sleep(0.002)
            second = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body()))
            await arrived(server, 2)
            held = not (first.done() or update.done() or second.done())
            gate.set()
            replies = [(await task).json for task in (first, second)]
            return held, (await update).status, [reply["meta_info"]["weight_version"] for reply in replies]

        assert server.client.run(work) == (True, 200, ["0", "7"])


def test_an_update_whose_client_leaves_is_an_update(lab, tmp_path):
    """The engine has the weights by then: they are served under the version that they came with."""
    other = lab.tiny.checkpoint(tmp_path, lab.tiny.hf_config("llama"), 1)
    with lab.serving() as server:
        begun, gate = threading.Event(), threading.Event()
        receive = server.service.engine.receive

        async def slow(*arguments):
            await receive(*arguments)
            begun.set()
            while not gate.is_set():
                await asyncio.sleep(0.005)

        server.service.engine.receive = slow

        async def work(session):
            moving = {"model_path": str(other), "weight_version": "7"}
            update = asyncio.ensure_future(lab.ask(session, "POST", "/update_weights_from_disk", json=moving))
            await asyncio.to_thread(begun.wait, 10)
            update.cancel()
            await asyncio.sleep(0.1)
            late = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body()))
            await asyncio.sleep(0.1)
            held = not late.done()
            gate.set()
            told = (await late).json["meta_info"]["weight_version"]
            return held, told, (await lab.ask(session, "GET", "/model_info")).json["weight_version"]

        assert server.client.run(work) == (True, "7", "7")


def test_a_damaged_checkpoint_is_not_served(lab, tmp_path):
    """Half of the tensors: the engine holds a mixture, says so, and recovers with the next whole update."""
    from safetensors.torch import load_file, save_file

    whole = load_file(lab.tiny.saved("llama") / "model.safetensors")
    save_file(dict(list(whole.items())[: len(whole) // 2]), tmp_path / "model.safetensors")
    with lab.serving() as server:
        before = server.client.post("/generate", body()).json["output_ids"]
        moved = server.client.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "3"})
        assert (moved.status, moved.json["success"]) == (400, False)
        served = server.client.post("/generate", body())
        assert served.status == 503 or served.json["output_ids"] == before
        again = {"model_path": str(lab.tiny.saved("llama")), "weight_version": "4"}
        assert server.client.post("/update_weights_from_disk", again).json["success"] is True
        after = server.client.post("/generate", body()).json
        assert (after["output_ids"], after["meta_info"]["weight_version"]) == (before, "4")


def test_asleep_it_says_so(lab):
    with lab.serving() as server:
        assert server.client.get("/release_memory_occupation").status == 200
        reply = server.client.post("/generate", body())
        assert (reply.status, "asleep" in reply.text) == (503, True)
        assert server.client.post("/release_memory_occupation", {"tags": ["curtains"]}).status == 400
        assert server.client.get("/resume_memory_occupation").status == 200
        assert server.client.post("/generate", body()).status == 200


def test_memory_is_not_taken_from_requests_under_way(lab):
    with lab.serving() as server:

        async def work(session):
            long = {**GREEDY, "max_new_tokens": 250}
            task = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body(sampling_params=long)))
            while not server.service.traffic.underway:
                await asyncio.sleep(0)
            await lab.ask(session, "POST", "/pause_generation", json={"mode": "retract"})
            refused = await lab.ask(session, "POST", "/release_memory_occupation", json={})
            await lab.ask(session, "POST", "/continue_generation", json={})
            return refused.status, (await task).status

        assert server.client.run(work) == (400, 200)


@pytest.mark.parametrize("paused", [True, False])
def test_a_score_can_be_aborted(lab, paused):
    """Outside, where it waits for a pause to end, and in the engine."""
    with lab.serving() as server:
        begun = threading.Event()

        async def never(tokens, temperature):
            begun.set()
            await asyncio.sleep(100)

        async def work(session):
            if paused:
                await lab.ask(session, "POST", "/pause_generation", json={"mode": "retract"})
            else:
                server.service.engine.score = never
            asked = body(rid="scoring", logprob_start_len=0)
            task = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=asked))
            await (arrived(server, 1) if paused else asyncio.to_thread(begun.wait, 10))
            await lab.ask(session, "POST", "/abort_request", json={"rid": "scor"})
            return (await task).json

        reply = server.client.run(work)
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert reply["output_ids"] == []
        assert not server.service.traffic.underway


def test_who_waits_for_a_pause_to_end_is_in_nobodys_way(lab):
    """As in SGLang: what comes meanwhile has not reached the engine, so its cache can be flushed."""
    with lab.serving() as server:

        async def work(session):
            await lab.ask(session, "POST", "/pause_generation", json={"mode": "retract"})
            tasks = [
                asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body(rid=rid, stream=stream)))
                for rid, stream in (("stays", False), ("goes-1", False), ("goes-2", True))
            ]
            await arrived(server, 3)
            flushed = (await lab.ask(session, "POST", "/flush_cache")).status
            twice = (await lab.ask(session, "POST", "/generate", json=body(rid="stays"))).status
            await lab.ask(session, "POST", "/abort_request", json={"rid": "goes"})
            gone = await asyncio.gather(*tasks[1:])
            await lab.ask(session, "POST", "/continue_generation", json={})
            return flushed, twice, gone[0].json, gone[1].events[0], (await tasks[0]).json

        flushed, twice, *gone, stayed = server.client.run(work)
        assert (flushed, twice) == (200, 400)
        assert [reply["meta_info"]["finish_reason"]["type"] for reply in gone] == ["abort", "abort"]
        assert len(stayed["output_ids"]) == 6


def test_a_flush_may_wait(shared, lab):
    async def work(session):
        task = asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body()))
        await asyncio.sleep(0.005)
        return (await lab.ask(session, "POST", "/flush_cache?timeout=10")).status, (await task).status

    assert shared.client.run(work) == (200, 200)
    assert shared.client.post("/flush_cache?timeout=soon").status == 400
    assert shared.client.post("/flush_cache?timeout=-1").status == 400


def test_stopping_answers_what_is_under_way(lab):
    """With what there is, once its time is up; who comes then is refused."""

    def stop(server):
        return asyncio.run_coroutine_threadsafe(server.service.settle(0.1), loop_of(server)).result(10)

    def loop_of(server):
        async def running():
            return asyncio.get_running_loop()

        return server.on_loop(running())

    with lab.serving() as server:

        async def work(session):
            long = {**GREEDY, "max_new_tokens": 250}
            tasks = [asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body(sampling_params=long)))]
            while not server.service.traffic.underway:
                await asyncio.sleep(0)
            await lab.ask(session, "POST", "/pause_generation", json={"mode": "in_place"})
            tasks += [asyncio.ensure_future(lab.ask(session, "POST", "/generate", json=body()))]
            await arrived(server, 2)
            await asyncio.to_thread(stop, server)
            late = await lab.ask(session, "POST", "/generate", json=body())
            return [(await task).json["meta_info"]["finish_reason"]["type"] for task in tasks], late.status

        assert server.client.run(work) == (["abort", "abort"], 503)
        assert server.client.get("/health").status == 503


def test_a_distillation_teacher_can_be_served(shared, lab):
    """Its client finds its own log-probs, at another temperature than 1 too, and the likeliest tokens."""
    teacher = pytest.importorskip("miles_distillation.scoring_server")
    from miles_distillation.plugin import ScoringServerOptions

    from miles.testing.contract import installed

    tokens = [5, 17, 3, 200, 9]
    context = lab.tiny.engine_context(installed(), lab.tiny.hf_config("llama"), lab.tiny.saved("llama"))

    async def main():
        client = teacher.ScoringServer(ScoringServerOptions(url=shared.url), context=context)
        await client.start()
        try:
            return await client.score(tokens, 0.5), await client.score_top(tokens, 3, 0.5)
        finally:
            await client.close()

    scores_T, (ids_TK, log_probs_TK) = asyncio.run(main())
    expected = lab.tiny.log_probs_of(lab.tiny.model(lab.tiny.hf_config("llama")), tokens, 0.5)
    np.testing.assert_allclose(scores_T, expected, atol=2e-4)
    assert ids_TK.shape == (5, 3)
    assert (log_probs_TK[1:, 0] >= scores_T[1:] - 1e-4).all()
