"""What a client does wrong is answered with 400, and troubles nobody else."""

import asyncio
import time

import pytest

FINE = {"max_new_tokens": 2, "temperature": 0}
WRONG = {
    "nothing": {},
    "no prompt": {"sampling_params": FINE},
    "text of the wrong type": {"text": 5, "sampling_params": FINE},
    "tokens of the wrong type": {"input_ids": "1 2 3", "sampling_params": FINE},
    "tokens that are text": {"input_ids": ["a", "b"], "sampling_params": FINE},
    "no tokens": {"input_ids": [], "sampling_params": FINE},
    "a negative temperature": {"input_ids": [1], "sampling_params": {**FINE, "temperature": -1}},
    "top_p of 0": {"input_ids": [1], "sampling_params": {**FINE, "top_p": 0}},
    "top_k of 0": {"input_ids": [1], "sampling_params": {**FINE, "temperature": 1, "top_k": 0}},
    "min_p of 2": {"input_ids": [1], "sampling_params": {**FINE, "min_p": 2}},
    "a negative length": {"input_ids": [1], "sampling_params": {**FINE, "max_new_tokens": -1}},
    "more than most": {"input_ids": [1], "sampling_params": {**FINE, "min_new_tokens": 3}},
    "two ids for one": {"input_ids": [1], "rid": ["a", "b"], "sampling_params": FINE},
    "one id twice": {"input_ids": [[1], [2]], "rid": ["a", "a"], "sampling_params": FINE},
}


def message(reply):
    """SGLang writes errors in two ways."""
    said = reply.json
    return said["error"]["message"] if "error" in said else said["message"]


def alive(server):
    assert len(server.generate(server.prompt(), 2)["output_ids"]) == 2


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_refused(server, what):
    if not server.ours and what in ("two ids for one", "no tokens"):
        pytest.skip("SGLang makes something of it")
    reply = server.client.post("/generate", WRONG[what])
    assert reply.status == 400, reply.text
    assert message(reply)
    alive(server)


def test_greedy_requests_may_have_any_top_k(server):
    """The one token that is drawn from is the likeliest."""
    greedy = server.generate(server.prompt(), 4)["output_ids"]
    for top_k in (0, -7, 2):
        assert server.generate(server.prompt(), 4, top_k=top_k)["output_ids"] == greedy


def test_what_is_no_json_is_refused(server):
    for data in (b"{", b"\xff\xfe", b"[1, 2]"):
        reply = server.client.post("/generate", data=data, headers={"Content-Type": "application/json"})
        assert reply.status == 400, data
    alive(server)


def test_tokens_outside_the_vocabulary_are_refused(server):
    if not server.ours:
        pytest.skip("SGLang does not look at them, and may end")
    for token in (server.vocabulary, 2**40):
        assert server.client.post("/generate", server.body([1, token])).status == 400
    alive(server)


def test_what_is_too_long_is_refused(server):
    prompt = server.prompt(length=server.context + 1)
    assert "longer than the model's context length" in message(server.client.post("/generate", server.body(prompt)))
    reply = server.client.post("/generate", server.body(server.prompt(), server.context))
    assert reply.status == 400
    assert "context length" in message(reply)
    alive(server)


def test_one_bad_prompt_refuses_its_batch(server):
    body = server.body([server.prompt(), server.prompt(length=server.context + 1)])
    assert server.client.post("/generate", body).status == 400
    alive(server)


def test_fields_that_nobody_knows_are_ignored(server):
    body = server.body(server.prompt(), 2) | {"a_field_of_another_day": 1, "extra_key": "x", "priority": None}
    assert server.client.post("/generate", body).status == 200


def test_unknown_paths_are_not_found(server):
    assert server.client.get("/no/such/path").status == 404


def test_others_do_not_suffer(server):
    """Wrong and right requests at once: each gets what is its due."""

    async def mixed(session):
        right = (server.ask(session, "POST", "/generate", json=server.body(server.prompt(i), 8)) for i in range(40))
        wrong = (server.ask(session, "POST", "/generate", json=WRONG["a negative temperature"]) for _ in range(40))
        return await asyncio.gather(*right), await asyncio.gather(*wrong)

    right, wrong = server.client.run(mixed)
    assert [len(reply.json["output_ids"]) for reply in right] == [8] * 40
    assert {reply.status for reply in wrong} == {400}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_takes_its_request_along(server, streamed):
    async def leave(session):
        body = server.body(server.prompt(30), server.long, stream=streamed)
        call = asyncio.ensure_future(session.post("/generate", json=body))
        await asyncio.sleep(0.3)
        if streamed:
            (await call).close()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    server.client.run(leave)
    until = time.monotonic() + (2 if server.ours else 20)
    while running(server) and time.monotonic() < until:
        time.sleep(0.05)
    assert running(server) == 0
    alive(server)


def running(server):
    return sum(load["num_running_reqs"] for load in server.client.get("/v1/loads").json["loads"])
