"""Requests: what a server is asked, what is refused, what comes back, and how it ends early."""

import asyncio
import math

import numpy as np
import pytest
from fake_server import FakeSGLang, context
from miles_sglang.engine import SGLangEngine
from miles_sglang.options import ExternalOptions, SGLangOptions
from story import ask, run, until

from miles.api import EngineError, GenerateRequest, RolloutEngine, SamplingParams


@pytest.fixture
def server():
    return FakeSGLang()


# ---------------------------------------------------------------------------------------------------------- requests


def test_it_satisfies_the_protocol():
    for options in (SGLangOptions(), ExternalOptions(urls="localhost:1")):
        assert isinstance(SGLangEngine(options, context=context()), RolloutEngine)


def test_generate_sends_tokens_and_returns_tokens(server):
    asked = ask("7.0", seed=5, priority=1, sampling={"temperature": 0.5, "stop_token_ids": (9,)})
    result = run(lambda engine: engine.generate(asked), server)
    assert result.tokens == [103, 104, 105, 106]
    assert result.weight_versions == [0] * 4
    assert (result.finish_reason, result.routed_experts) == ("length", None)
    (body,) = server.called("/generate")
    assert body["input_ids"] == [10, 11, 12]
    assert body["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "max_new_tokens": 4,
        "ignore_eos": False,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "stop_token_ids": [9],
        "sampling_seed": 5,
    }
    assert (body["priority"], body["extra_key"], body["stream"]) == (1, "0", False)
    assert "7.0" in body["rid"]
    assert body["rid"].endswith("$")
    assert "return_sampling_mask" not in body
    assert "return_routed_experts" not in body


def test_without_stop_tokens_the_checkpoints_own_do_not_count(server):
    run(lambda engine: engine.generate(ask()), server)
    assert server.called("/generate")[0]["sampling_params"]["ignore_eos"] is True


def test_what_a_server_does_not_know_is_not_sent():
    plain = FakeSGLang(enable_deterministic_inference=False, enable_priority_scheduling=False)
    run(lambda engine: engine.generate(ask(seed=5, priority=1, sampling={"min_p": 0.1})), plain)
    (body,) = plain.called("/generate")
    assert "priority" not in body
    assert "sampling_seed" not in body["sampling_params"]
    assert body["sampling_params"]["min_p"] == 0.1


GRAPHS = {"decode": {"backend": "full", "max_bs": 2, "bs": [1, 2]}, "prefill": {"backend": "disabled"}}


@pytest.mark.parametrize(
    ("requests", "servers", "config", "told"),
    [
        (2, 1, GRAPHS, 0),
        (5, 1, GRAPHS, 1),
        (4, 2, GRAPHS, 0),
        (5, 2, GRAPHS, 1),
        (5, 1, {"decode": {"backend": "disabled", "max_bs": 2}}, 0),
        (5, 1, None, 0),
    ],
)
def test_more_requests_than_graphs_are_told_once(requests, servers, config, told, caplog):
    async def story(engine):
        await asyncio.gather(*(engine.generate(ask(str(number))) for number in range(requests)))

    run(story, *(FakeSGLang(cuda_graph_config=config) for _ in range(servers)))
    assert caplog.text.count("more than 2 requests at once") == told
    assert caplog.text.count("--cuda-graph-max-bs-decode") == told


def test_the_fewest_graphs_of_several_servers_count(caplog):
    async def story(engine):
        await asyncio.gather(*(engine.generate(ask(str(number))) for number in range(5)))

    more = {"decode": {"backend": "full", "max_bs": 8}}
    run(story, *(FakeSGLang(cuda_graph_config=config) for config in (more, GRAPHS)))
    assert caplog.text.count("more than 2 requests at once") == 1


def test_a_server_where_low_priorities_go_first_gets_the_contrary():
    upside_down = FakeSGLang(schedule_low_priority_values_first=True)
    run(lambda engine: engine.generate(ask(priority=1)), upside_down)
    assert upside_down.called("/generate")[0]["priority"] == -1


def test_truncated_sampling_asks_for_the_truncated_log_probs(server):
    result = run(lambda engine: engine.generate(ask(sampling={"top_p": 0.9})), server)
    (body,) = server.called("/generate")
    assert body["return_sampling_mask"] is True
    assert body["sampling_params"]["top_k"] > 10**6, "a mask needs a number, which here is beyond any vocabulary"
    assert result.log_probs == [-0.25] * 4
    run(lambda engine: engine.generate(ask(sampling={"top_p": 0.9, "temperature": 0.0})), server)
    assert "return_sampling_mask" not in server.called("/generate")[1], "greedy: of the model at temperature 1"


def test_experts_cover_every_position_but_the_last(server):
    rows = run(lambda engine: engine.generate(ask(routed_experts=True)), server).routed_experts
    assert rows[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.dtype == np.uint8
    rows = run(lambda engine: engine.generate(ask(routed_experts=True, routed_experts_from=2)), server).routed_experts
    assert rows[:, 0, 0].tolist() == [2, 3, 4, 5]


def test_the_context_limits_what_is_generated():
    short = FakeSGLang(context_length=6)

    async def story(engine):
        assert engine.max_len == 6
        with pytest.raises(EngineError, match="it takes 1 to 5"):
            await engine.generate(ask(prompt=6))
        return await engine.generate(ask(length=100))

    result = run(story, short)
    assert (len(result.tokens), result.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest("1", [5, 1024], SamplingParams()), r"vocabulary \[0, 1024\)"),
        (GenerateRequest("1", [5, -1], SamplingParams()), "vocabulary"),
        (GenerateRequest("1", [], SamplingParams()), "0 tokens"),
        (ask(multimodal={"pixel_values": 1}), "images"),
        (ask(sampling={"stop": ("x",)}), "--skip-tokenizer-init"),
        (ask(sampling={"min_new_tokens": 2}), "--skip-tokenizer-init"),
        (ask(sampling={"temperature": -1.0}), "temperature -1.0"),
        (ask(sampling={"temperature": math.inf}), "not finite"),
        (ask(sampling={"top_p": math.nan}), "not finite"),
        (ask(length=0), "max_new_tokens 0"),
        (ask(sampling={"min_p": 0.1}), "min_p 0.1, which ends a server"),
    ],
)
def test_requests_that_would_end_the_server_or_lose_something_are_refused(server, request_, message):
    with pytest.raises(EngineError, match=message):
        run(lambda engine: engine.generate(request_), server)
    assert server.called("/generate") == []


def test_experts_need_a_server_that_returns_them():
    without = FakeSGLang(enable_return_routed_experts=False)
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        run(lambda engine: engine.generate(ask(routed_experts=True)), without)


def test_stop_strings_reach_a_server_with_a_tokenizer():
    able = FakeSGLang(skip_tokenizer_init=False)
    run(lambda engine: engine.generate(ask(sampling={"stop": ("x", "y"), "min_new_tokens": 2})), able)
    params = able.called("/generate")[0]["sampling_params"]
    assert (params["stop"], params["min_new_tokens"]) == (["x", "y"], 2)


def test_score_reads_the_prompt(server):
    scores = run(lambda engine: engine.score([7, 8, 9]), server)
    assert scores.tolist() == [0.0, -0.5, -1.0]
    assert scores.dtype == np.float32


def test_at_another_temperature_each_token_is_asked_about_as_the_next(server):
    async def story(engine):
        for temperature in (0.0, math.nan, math.inf):
            with pytest.raises(EngineError, match=f"temperature {temperature}"):
                await engine.score([7, 8], temperature=temperature)
        return await engine.score([7, 8, 9], temperature=0.5)

    scores = run(story, server)
    assert scores.tolist() == [0.0, -1.0, -2.0]
    asked = sorted((body["input_ids"], body["token_ids_logprob"]) for body in server.called("/generate"))
    assert asked == [([7], [8]), ([7, 8], [9])]


def test_a_score_that_is_missing_is_asked_for_again(server):
    async def story(engine):
        server.spoils = [{"output_token_ids_logprobs": []}]
        return await engine.score([7, 8], temperature=0.5)

    assert run(story, server, retries=1).tolist() == [0.0, -1.0]


@pytest.mark.parametrize("spoilt", [{"output_token_logprobs": []}, {"finish_reason": None}])
def test_an_answer_that_is_malformed_is_asked_for_again(server, spoilt):
    async def story(engine):
        server.spoils = [spoilt]
        result = await engine.generate(ask())
        return result, (await engine.health()).counts

    result, counts = run(story, server)
    assert result.tokens == [103, 104, 105, 106]
    assert counts == {"retries": 1, "malformed": 1}
    first, second = server.called("/generate")
    assert first.pop("rid") != second.pop("rid")
    assert first == second
    assert server.called("/abort_request")


def test_an_answer_that_stays_malformed_is_an_error_that_quotes_it(server):
    async def story(engine):
        server.spoils = [{"output_token_logprobs": "nonsense"}] * 2
        await engine.generate(ask())

    with pytest.raises(EngineError, match=r"failed 2 times.*nonsense"):
        run(story, server, retries=1)


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_tells_tokens_as_they_come(server):
    async def story(engine):
        return [piece async for piece in engine.stream(ask(length=5, routed_experts=True))]

    pieces = run(story, server)
    assert [token for piece in pieces for token in piece.tokens] == [103, 104, 105, 106, 107]
    assert [piece.finish_reason for piece in pieces] == [""] * 5 + ["length"]
    assert pieces[-1].routed_experts[:, 0, 0].tolist() == list(range(7))


def test_whoever_leaves_a_stream_takes_his_request_along(server):
    async def story(engine):
        async for piece in (pieces := engine.stream(ask(length=2000))):
            assert piece.tokens
            break
        await pieces.aclose()
        await until(lambda: not server.aborted)

    run(story, server)


def test_without_increments_a_stream_has_one_piece():
    async def story(engine):
        return [piece async for piece in engine.stream(ask())]

    (piece, last) = run(story, FakeSGLang(incremental_streaming_output=False))
    assert (len(piece.tokens), last.finish_reason) == (4, "length")


# ------------------------------------------------------------------------------------------------------------- aborting


def test_abort_reaches_one_request_even_where_its_id_begins_another(server):
    async def story(engine):
        tasks = [asyncio.create_task(engine.generate(ask(id, length=60))) for id in ("1", "10")]
        await asyncio.sleep(0.05)
        await engine.abort("1")
        return await asyncio.gather(*tasks)

    one, ten = run(story, server)
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

    assert run(story, server).finish_reason == "abort"


def test_tokens_that_are_scored_can_be_aborted(server):
    async def story(engine):
        await engine.pause()
        task = asyncio.create_task(engine.score([7, 8]))
        await asyncio.sleep(0)
        await engine.abort()
        with pytest.raises(EngineError, match="aborted"):
            await task

    run(story, server)


def test_frozen_requests_can_be_aborted(server):
    async def story(engine):
        tasks = [asyncio.create_task(engine.generate(ask(id, length=300))) for id in ("1", "2")]
        await until(lambda: len(server.aborted) == 2)
        await engine.pause("in_place")
        await engine.abort("1")
        assert server.paused
        assert tasks[0].done()
        await engine.abort("2")
        await engine.resume()
        return await asyncio.gather(*tasks)

    assert [result.finish_reason for result in run(story, server)] == ["abort"] * 2
