"""What comes out of `/generate`."""

import base64

import numpy as np
import pytest


def values(rows):
    return [value for value, *_ in rows]


def output(reply):
    return values(reply["meta_info"]["output_token_logprobs"])


def test_an_answer_says_what_sglang_says_of_it(server):
    reply = server.generate(server.prompt(), 5, rid="shape-1")
    meta = reply["meta_info"]
    assert meta["id"] == "shape-1"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (6, 5)
    assert isinstance(meta["weight_version"], str)
    assert 0 <= meta["cached_tokens"] < 6 + 5
    assert meta["e2e_latency"] > 0
    assert [row[1:] for row in meta["output_token_logprobs"]] == [[token, None] for token in reply["output_ids"]]
    assert all(np.isfinite(value) and value <= 0 for value in output(reply))
    assert meta["input_token_logprobs"] == []


def test_without_being_asked_it_says_no_log_probs(server):
    body = server.body(server.prompt()) | {"return_logprob": False}
    assert "output_token_logprobs" not in server.client.post("/generate", body).json["meta_info"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_of_generated_tokens_are_their_scores(server, temperature):
    prompt = server.prompt(1)
    reply = server.generate(prompt, 24, temperature=temperature)
    scored = values(server.score([*prompt, *reply["output_ids"]]))[len(prompt) :]
    np.testing.assert_allclose(output(reply), scored, atol=server.tolerance)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_how_likely_given_tokens_are_next(server, temperature):
    """At the temperature of the answer; of the token that was drawn it is what the answer says."""
    prompt, candidates = server.prompt(4), server.prompt(5)[:3]
    asked = server.body(prompt, 1, temperature=temperature) | {"token_ids_logprob": candidates}
    reply = server.client.post("/generate", asked).json
    (rows,) = reply["meta_info"]["output_token_ids_logprobs"]
    assert [row[1] for row in rows] == candidates
    again = asked | {"token_ids_logprob": reply["output_ids"]}
    (drawn,) = server.client.post("/generate", again).json["meta_info"]["output_token_ids_logprobs"]
    np.testing.assert_allclose(values(drawn), output(reply), atol=server.tolerance)
    if temperature == 1:
        scored = [values(server.score([*prompt, token]))[-1] for token in candidates]
        np.testing.assert_allclose(values(rows), scored, atol=server.tolerance)


def test_greedy_is_the_same_each_time(server):
    first, second = (server.generate(server.prompt(2), 16) for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    np.testing.assert_allclose(output(first), output(second), atol=server.tolerance)


def test_scores_begin_where_asked_with_nothing_for_the_first(server):
    tokens = server.prompt(3, length=9)
    whole = server.score(tokens)
    assert [row[1] for row in whole] == tokens
    assert whole[0][0] is None
    assert all(value < 0 for value in values(whole)[1:])
    rest = server.score(tokens, start=4)
    assert [row[1] for row in rest] == tokens[4:]
    assert rest[0][0] is None
    np.testing.assert_allclose(values(rest)[1:], values(whole)[5:], atol=server.tolerance)


def test_scoring_generates_nothing(server):
    reply = server.generate(server.prompt(), 0, logprob_start_len=0)
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert reply["meta_info"]["completion_tokens"] == 0


def test_a_prompt_can_be_scored_and_continued_at_once(server):
    reply = server.generate(server.prompt(4), 3, logprob_start_len=0)
    assert len(reply["meta_info"]["input_token_logprobs"]) == 6
    assert len(reply["output_ids"]) == 3


def test_a_stop_token_ends_and_stays(server):
    prompt = server.prompt(5)
    greedy = server.generate(prompt, 12)["output_ids"]
    stop = greedy[4]
    until = greedy[: greedy.index(stop) + 1]
    reply = server.generate(prompt, 12, ignore_eos=False, stop_token_ids=[stop])
    assert reply["output_ids"] == until
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(output(reply)) == len(until)
    ignoring = server.generate(prompt, 12, ignore_eos=True, stop_token_ids=[stop])
    assert ignoring["output_ids"] == greedy  # SGLang ignores all stop tokens then


def test_stop_tokens_wait_for_min_new_tokens(server):
    if not server.text:
        pytest.skip("needs a server with a tokenizer")
    prompt = server.prompt(5)
    stop = server.generate(prompt, 1)["output_ids"][0]
    reply = server.generate(prompt, 12, ignore_eos=False, stop_token_ids=[stop], min_new_tokens=5)
    assert stop not in reply["output_ids"][:5]
    assert len(reply["output_ids"]) >= 5


def test_a_stop_string_ends_and_is_cut_off_the_text(server):
    if not server.text:
        pytest.skip("needs a server with a tokenizer")
    prompt = server.prompt(6)
    whole = server.generate(prompt, 40)["text"]
    stop = next(c for c in whole[3:] if c.isalnum())
    reply = server.generate(prompt, 40, stop=[stop])
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["text"] == whole[: whole.index(stop)]
    kept = server.generate(prompt, 40, stop=stop, no_stop_trim=True)
    assert kept["output_ids"] == reply["output_ids"]
    assert kept["text"].startswith(reply["text"] + stop)


def test_text_goes_in_and_comes_out(server):
    if not server.text:
        pytest.skip("needs a server with a tokenizer")
    sampling = {"max_new_tokens": 4, "temperature": 0}
    reply = server.client.post("/generate", {"text": "hello world", "sampling_params": sampling}).json
    assert isinstance(reply["text"], str)
    assert reply["meta_info"]["prompt_tokens"] > 1


def test_a_batch_is_answered_in_order(server):
    prompts = [server.prompt(i, length=4 + i) for i in range(5)]
    alone = [server.generate(prompt, 6) for prompt in prompts]
    replies = server.generate(prompts, 6, rid=[f"b{i}" for i in range(5)])
    assert [reply["meta_info"]["id"] for reply in replies] == [f"b{i}" for i in range(5)]
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [4, 5, 6, 7, 8]
    for reply, single in zip(replies, alone, strict=True):
        np.testing.assert_allclose(output(reply)[0], output(single)[0], atol=server.tolerance)


def test_a_batch_may_have_parameters_for_each(server):
    body = server.body([server.prompt(1), server.prompt(2)])
    body["sampling_params"] = [body["sampling_params"] | {"max_new_tokens": n} for n in (3, 5)]
    assert [len(reply["output_ids"]) for reply in server.client.post("/generate", body).json] == [3, 5]


def test_n_answers_to_one_prompt(server):
    replies = server.generate(server.prompt(7), 12, n=3, temperature=1.0)
    assert len(replies) == 3
    assert len({reply["meta_info"]["id"] for reply in replies}) == 3
    different = len({tuple(reply["output_ids"]) for reply in replies})
    assert different == 1 if server.one_seed else different > 1


def test_a_seed_decides(server):
    if not server.info["enable_deterministic_inference"]:
        pytest.skip("seeds count only with --enable-deterministic-inference")
    drawn = [
        server.generate(server.prompt(8), 16, temperature=1.0, sampling_seed=seed)["output_ids"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_nothing_but_the_likeliest_is_greedy(server, cut):
    if "min_p" in cut and server.one_seed:
        pytest.skip("min_p ends SGLang where --enable-deterministic-inference gives every request a seed")
    greedy = server.generate(server.prompt(9), 10)["output_ids"]
    assert server.generate(server.prompt(9), 10, temperature=1.0, **cut)["output_ids"] == greedy


def test_a_cached_prefix_is_counted(server):
    prompt = server.prompt(10, length=40)
    server.generate(prompt, 4)
    assert server.generate([*prompt, 1], 1)["meta_info"]["cached_tokens"] >= 39


def test_expert_choices(server):
    if not server.info["enable_return_routed_experts"]:
        pytest.skip("no mixture of experts, or not asked to return them")
    prompt = server.prompt(11)
    reply = server.generate(prompt, 5, return_routed_experts=True)
    cut = server.generate(prompt, 5, return_routed_experts=True, routed_experts_start_len=4)
    whole, rest = (
        np.frombuffer(base64.b64decode(r["meta_info"]["routed_experts"]), np.int32).reshape(rows, -1)
        for r, rows in ((reply, 6 + 5 - 1), (cut, 6 + 5 - 1 - 4))
    )
    np.testing.assert_array_equal(rest, whole[4:])
    assert whole.min() >= 0


def test_two_hundred_at_once_get_their_own_answers(server):
    """Each reply scores the prompt it was sent, under the id it was sent with."""
    prompts = {f"own-{i}": server.prompt(i, length=4 + i % 7) for i in range(200)}

    async def all_at_once(session):
        import asyncio

        asked = (
            server.ask(session, "POST", "/generate", json=server.body(prompt, 1 + i % 5, rid=rid, logprob_start_len=0))
            for i, (rid, prompt) in enumerate(prompts.items())
        )
        return await asyncio.gather(*asked)

    replies = [reply.json for reply in server.client.run(all_at_once)]
    for i, ((rid, prompt), reply) in enumerate(zip(prompts.items(), replies, strict=True)):
        assert reply["meta_info"]["id"] == rid
        assert [row[1] for row in reply["meta_info"]["input_token_logprobs"]] == prompt
        assert len(reply["output_ids"]) == len(output(reply)) == 1 + i % 5
