"""The scoring engine against a small server with a real tiny model, and against a reply of SGLang 0.5.17 itself."""

import asyncio
import time

import numpy as np
import pytest
import torch
from miles_distillation.plugin import ScoringServerOptions
from miles_distillation.scoring_server import ScoringServer

from miles.api import ConfigError, EngineError, GenerateRequest, SamplingParams
from miles.testing import installed, tiny

TOKENS = [5, 17, 3, 200, 17, 8]
RECORDED = {
    "id": "0b1f9345bb4440209d02cb1674df5bea",
    "finish_reason": {"type": "length", "length": 0},
    "prompt_tokens": 6,
    "weight_version": "1",
    "num_retractions": 0,
    "input_token_logprobs": [
        [None, 139, None],
        [-6.2237548828125, 868, None],
        [-12.998184204101562, 782, None],
        [-5.7185235023498535, 262, None],
        [-11.396116256713867, 508, None],
        [-14.767878532409668, 461, None],
    ],
    "output_token_logprobs": [],
    "completion_tokens": 0,
    "cached_tokens": 0,
}
"""`meta_info` of an answer that a server of SGLang 0.5.17 gave to such a request."""


def use(server, work, url=None, **options):
    """Start an engine for the server, work with it, close it."""
    given = {"url": url or server.url, "retries": 2, "start_timeout": 5.0, **options}
    context = tiny.engine_context(installed(), tiny.hf_config("llama"), tiny.saved("llama"))
    engine = ScoringServer(ScoringServerOptions(**given), context=context)
    engine.first_pause = 0.01

    async def main():
        try:
            await engine.start()
            return await asyncio.wait_for(work(engine), 30)
        finally:
            await engine.close()

    return asyncio.run(main())


def score(server, tokens=TOKENS, temperature=1.0, **options):
    return use(server, lambda engine: engine.score(tokens, temperature), **options)


def score_top(server, k, tokens=TOKENS, temperature=1.0):
    return use(server, lambda engine: engine.score_top(tokens, k, temperature))


def generations(server):
    return [body for path, body in server.calls if path == "/generate"]


def test_scores_are_the_models(server):
    found_T = score(server)
    assert found_T.dtype == np.float32
    assert found_T[0] == 0
    np.testing.assert_allclose(found_T, tiny.log_probs_of(server.lm, TOKENS).numpy(), atol=1e-5)


def test_the_request_is_what_sglang_reads(server):
    score(server)
    (body,) = generations(server)
    assert body == {
        "input_ids": TOKENS,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 0,
    }


def test_a_reply_that_sglang_gave_is_read(server):
    server.scored = lambda body: RECORDED

    async def work(engine):
        engine.vocabulary = 1024
        return await engine.score([139, 868, 782, 262, 508, 461])

    expected = [
        0.0,
        -6.2237548828125,
        -12.998184204101562,
        -5.7185235023498535,
        -11.396116256713867,
        -14.767878532409668,
    ]
    np.testing.assert_allclose(use(server, work), np.float32(expected))


def test_the_likeliest_tokens_are_the_models(server):
    ids_TK, log_probs_TK = score_top(server, k=4)
    assert (ids_TK.shape, ids_TK.dtype) == ((6, 4), np.int64)
    assert (log_probs_TK.shape, log_probs_TK.dtype) == ((6, 4), np.float32)
    with torch.no_grad():
        expected_TV = server.lm(torch.tensor([TOKENS]), use_cache=False).logits[0].double().log_softmax(-1)
    best = expected_TV[:-1].sort(descending=True)
    assert ids_TK[1:].tolist() == best.indices[:, :4].tolist()
    np.testing.assert_allclose(log_probs_TK[1:], best.values[:, :4].numpy(), atol=1e-5)


def test_one_token_has_nothing_before_it(server):
    assert score(server, tokens=[7]).tolist() == [0.0]
    ids_TK, log_probs_TK = score_top(server, k=3, tokens=[7])
    assert ids_TK.tolist() == [[0, 0, 0]]
    assert log_probs_TK.tolist() == [[0.0, 0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------- temperature


def test_a_server_that_scores_at_temperature_1_only_is_found_out(server):
    for work in (lambda engine: engine.score(TOKENS, 0.6), lambda engine: engine.score_top(TOKENS, 2, 0.6)):
        with pytest.raises(EngineError, match="rollout's is 0.6") as caught:
            use(server, work)
        assert server.url in str(caught.value)
        assert "--opd-teacher-load" in str(caught.value)


def test_a_server_that_scales_and_says_so_is_believed(server):
    server.scales = True
    np.testing.assert_allclose(score(server, temperature=0.6), tiny.log_probs_of(server.lm, TOKENS, 0.6), atol=1e-5)
    assert generations(server)[-1]["input_logprob_temperature"] == 0.6
    _, cold_TK = score_top(server, k=1, temperature=0.25)
    _, warm_TK = score_top(server, k=1)
    assert (cold_TK[1:] > warm_TK[1:]).all()


def test_a_server_that_confirms_another_temperature_is_refused(server):
    server.altered = lambda told: told | {"input_logprob_temperature": 1.0}
    with pytest.raises(EngineError, match="at temperature 1"):
        score(server, temperature=0.6)


def test_greedy_is_no_distribution(server):
    with pytest.raises(EngineError, match="temperature=0"):
        score(server, temperature=0.0)


# ---------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("failures", [[503], [500, 429]])
def test_a_failure_that_passes_is_outlived(server, failures):
    server.failures = list(failures)
    assert len(score(server)) == 6
    assert len(generations(server)) == len(failures) + 1


def test_a_broken_connection_is_outlived(server):
    async def work(engine):
        server.breaks_off = 2
        return await engine.score(TOKENS)

    assert len(use(server, work)) == 6


def test_what_does_not_pass_is_an_error_that_names_the_server(server):
    server.failures = [503] * 9
    with pytest.raises(EngineError, match="3 attempts.*503.*failure 503") as caught:
        score(server)
    assert server.url in str(caught.value)
    assert len(generations(server)) == 3


def test_a_refusal_is_not_repeated(server):
    server.failures = [400]
    with pytest.raises(EngineError, match="refused /generate .400.*failure 400"):
        score(server)
    assert len(generations(server)) == 1


def test_nobody_there(server):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 is not ready after start_timeout=0.05 seconds"):
        score(server, url="http://127.0.0.1:9", start_timeout=0.05)
    assert time.monotonic() - began < 5


def test_an_answer_that_takes_too_long(server):
    server.altered = lambda told: time.sleep(0.3) or told
    with pytest.raises(EngineError, match="ReadTimeout"):
        score(server, timeout=0.1, retries=0)


def test_the_last_token_of_the_vocabulary_is_called_0_by_sglang(server):
    tokens = [5, 319, 319, 0, 8]
    np.testing.assert_allclose(score(server, tokens), tiny.log_probs_of(server.lm, tokens).numpy(), atol=1e-5)


def test_an_aborted_request(server):
    server.altered = lambda told: told | {"finish_reason": {"type": "abort", "message": "out of memory"}}
    with pytest.raises(EngineError, match="aborted the request: out of memory"):
        score(server)


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        (lambda rows: rows[:-1], "6 tokens and spoke of 5"),
        (lambda rows: [[None, 9, None], *rows[1:]], "6 tokens and spoke of 6 which are not the same"),
        (lambda rows: [*rows[:3], [None, TOKENS[3], None], *rows[4:]], "no finite log-prob of token 200 at position 3"),
        (lambda rows: None, "spoke of 0"),
    ],
)
def test_an_answer_about_something_else(server, altered, message):
    server.altered = lambda told: told | {"input_token_logprobs": altered(told["input_token_logprobs"])}
    with pytest.raises(EngineError, match=message):
        score(server)


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        (lambda rows: [None, *(row[:2] for row in rows[1:])], "the 3 likeliest tokens of each place and said fewer"),
        (lambda rows: None, "said fewer"),
        (lambda rows: [None, *([*row[:2], [-9.0, 320, None]] for row in rows[1:])], "names token 320.* has 320"),
        (lambda rows: [None, *([*row[:2], [None, 3, None]] for row in rows[1:])], "not finite: k=3"),
    ],
)
def test_likeliest_tokens_that_cannot_be(server, altered, message):
    server.altered = lambda told: told | {"input_top_logprobs": altered(told["input_top_logprobs"])}
    with pytest.raises(EngineError, match=message):
        score_top(server, k=3)


@pytest.mark.parametrize("tokens", [[], [320], [-1, 3]])
def test_tokens_that_are_none_of_the_students(server, tokens):
    with pytest.raises(EngineError, match="each of the student's"):
        score(server, tokens=tokens)
    assert generations(server) == []


def test_an_answer_that_is_not_sglangs(server):
    server.altered = lambda told: None
    with pytest.raises(EngineError, match="does not answer as SGLang's /generate does"):
        score(server)


# ------------------------------------------------------------------------------------------------------- at the start


def test_a_tokenizer_of_another_family_is_refused(server):
    server.tokenizer = server.tokenizer.__class__(tokenizer_object=server.tokenizer.backend_tokenizer)
    server.tokenizer.add_tokens(["12 + "])
    with pytest.raises(EngineError, match="splits text otherwise"):
        score(server)
    assert len(score(server, check_tokenizer=False)) == 6


@pytest.mark.parametrize("missing", ["tokenizer", "route"])
def test_a_server_without_a_tokenizer_is_taken_as_it_is(server, missing):
    if missing == "tokenizer":
        server.tokenizer = None
    else:
        server.info_path = "/get_model_info"  # as older servers call it
    assert len(score(server)) == 6


def test_a_server_of_something_else_is_refused(server):
    server.info = {"model_path": "judge", "is_generation": False}
    with pytest.raises(EngineError, match="serves judge, which is no language model"):
        score(server)


def test_the_key_goes_along(server, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    score(server, api_key_variable="TEACHER_KEY")
    assert all(headers["Authorization"] == "Bearer sesame" for headers in server.headers_seen)
    with pytest.raises(EngineError, match="NO_SUCH_KEY"):
        score(server, api_key_variable="NO_SUCH_KEY")


# ------------------------------------------------------------------------------------------------------ many at once


def test_no_more_requests_than_allowed_are_under_way(server):
    server.altered = lambda told: time.sleep(0.01) or told
    sequences = [[3, 4, token] for token in range(20)]

    async def work(engine):
        found = asyncio.gather(*(engine.score(tokens) for tokens in sequences))
        await asyncio.sleep(0)  # all are sent, and none is answered
        await asyncio.sleep(0)
        health = await engine.health()
        assert (health.running, health.waiting) == (3, 17)
        return await found

    found = use(server, work, concurrency=3)
    for tokens, found_T in zip(sequences, found, strict=True):
        np.testing.assert_allclose(found_T, tiny.log_probs_of(server.lm, tokens).numpy(), atol=1e-5)
    assert server.most_running <= 3


def test_several_servers_share_the_work_and_stand_in_for_each_other(server, second_server):
    server.altered = second_server.altered = lambda told: time.sleep(0.005) or told

    async def work(engine):
        await asyncio.gather(*(engine.score([3, token]) for token in range(12)))
        shares = [len(generations(each)) for each in (server, second_server)]
        server.failures = [500] * 20
        return shares, await asyncio.gather(*(engine.score([4, token]) for token in range(6)))

    shares, found = use(server, work, url=f"{server.url}, {second_server.url}/")
    assert min(shares) >= 3
    assert all(len(found_T) == 2 for found_T in found)


def test_it_generates_nothing_and_takes_no_weights(server):
    async def work(engine):
        with pytest.raises(EngineError, match="teacher.engine"):
            await engine.generate(GenerateRequest("r", TOKENS, SamplingParams()))
        with pytest.raises(EngineError, match="no weights"):
            await engine.receive("inprocess", 1, [])
        assert (await engine.health()).running == 0

    use(server, work)


def test_closed_it_says_so(server):
    async def work(engine):
        await engine.close()
        await engine.score(TOKENS)

    with pytest.raises(EngineError, match="not started, or closed"):
        use(server, work)


@pytest.mark.parametrize(
    "bad", [{"url": "localhost:30000"}, {"url": "http://a,b"}, {"concurrency": 0}, {"retries": -1}, {"timeout": 0}]
)
def test_options_that_cannot_be(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ScoringServerOptions(**{"url": "http://a", **bad})
