"""Pauses, aborts, caches, memory, weights, and what the server says of itself."""

import asyncio
import time

import numpy as np
import pytest


def post(server, session, path, body=None):
    return server.ask(session, "POST", path, json={} if body is None else body)


def generating(server, session, prompt, length, **more):
    return asyncio.ensure_future(post(server, session, "/generate", server.body(prompt, length, **more)))


async def begun(server, session, count):
    """Wait until so many requests run."""
    while True:
        loads = (await server.ask(session, "GET", "/v1/loads")).json["loads"]
        if sum(load["num_running_reqs"] for load in loads) >= count:
            return
        await asyncio.sleep(0.01)


def test_it_says_what_it_serves(server):
    model = server.client.get("/model_info").json
    assert model["is_generation"] is True
    assert isinstance(model["weight_version"], str)
    assert model == server.client.get("/get_model_info").json
    info = server.client.get("/get_server_info").json
    known = {"model_path", "served_model_name", "incremental_streaming_output", "enable_memory_saver", "version"}
    assert known <= info.keys()


def test_it_tells_how_it_splits_text(server):
    if not server.text:
        pytest.skip("needs a server with a tokenizer")
    replies = [server.client.post("/tokenize", {"prompt": p}) for p in ("hello world", ["hello world", "a"])]
    if not server.ours and server.endless:
        assert [reply.status for reply in replies] == [500, 500]
        return
    told = [reply.json for reply in replies]
    assert told[0]["tokens"] == told[1]["tokens"][0]
    assert told[0]["count"] == len(told[0]["tokens"]) > 1


def test_it_is_well(server):
    for path in ("/health", "/health_generate"):
        assert server.client.get(path).status == 200
    names = [model["id"] for model in server.client.get("/v1/models").json["data"]]
    assert names == [server.info["served_model_name"]]


# ------------------------------------------------------------------------------------------------------------- aborts


def test_an_abort_by_id_ends_what_begins_with_it(server):
    """SGLang matches ids from their beginning, of requests that it has begun when one of just this id is aborted."""

    async def work(session):
        tasks = {
            rid: generating(server, session, server.prompt(i), server.long, rid=rid)
            for i, rid in enumerate(("x-1", "x-12"))
        }
        await begun(server, session, 2)
        tasks["other"] = generating(server, session, server.prompt(2), 8, rid="other")
        while not (tasks["x-1"].done() and tasks["x-12"].done()):
            await post(server, session, "/abort_request", {"rid": "x-1"})
            await asyncio.sleep(0.05)
        return {rid: (await task).json for rid, task in tasks.items()}

    replies = server.client.run(work)
    for rid in ("x-1", "x-12"):
        reply = replies[rid]
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(reply["output_ids"]) == len(reply["meta_info"]["output_token_logprobs"]) < server.long
    assert replies["other"]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_an_abort_of_all_ends_all(server):
    async def work(session):
        tasks = [generating(server, session, server.prompt(i), server.long) for i in range(4)]
        await begun(server, session, 4)
        while not all(task.done() for task in tasks):
            await post(server, session, "/abort_request", {"abort_all": True})
            await asyncio.sleep(0.05)
        return [task.result().json["meta_info"]["finish_reason"]["type"] for task in tasks]

    assert server.client.run(work) == ["abort"] * 4


def test_an_abort_of_nobody_is_no_fault(server):
    assert server.client.post("/abort_request", {"rid": "never heard of"}).status == 200
    assert server.client.post("/abort_request", {"rid": ""}).status == 200


def test_a_stream_that_is_aborted_ends(server):
    async def work(session):
        task = generating(server, session, server.prompt(1), server.long, rid="streamed-1", stream=True)
        await begun(server, session, 1)
        while not task.done():
            await post(server, session, "/abort_request", {"rid": "streamed-1"})
            await asyncio.sleep(0.05)
        return (await task).events

    events = server.client.run(work)
    assert events[-1] == "[DONE]"
    assert events[-2]["meta_info"]["finish_reason"]["type"] == "abort"


# ------------------------------------------------------------------------------------------------------------- pauses


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_holds_everything_up(server, mode):
    async def work(session):
        whole = (await generating(server, session, server.prompt(2), 300)).json
        task = generating(server, session, server.prompt(2), 300)
        await asyncio.sleep(0.05)
        assert (await post(server, session, "/pause_generation", {"mode": mode})).status == 200
        before = task.done()
        late = generating(server, session, server.prompt(3), 4)
        await asyncio.sleep(0.3)
        assert task.done() == before
        assert not late.done()
        assert (await post(server, session, "/continue_generation")).status == 200
        return whole, (await task).json, (await late).json

    whole, paused, late = server.client.run(work)
    assert len(late["output_ids"]) == 4
    assert len(paused["output_ids"]) == 300
    if server.ours:  # elsewhere a new prefill may break ties in another way
        assert paused["output_ids"] == whole["output_ids"]


def test_a_pause_can_abort(server):
    async def work(session):
        tasks = [generating(server, session, server.prompt(i), server.long) for i in range(2)]
        await begun(server, session, 2)
        await post(server, session, "/pause_generation", {"mode": "abort"})
        ended = [(await task).json["meta_info"]["finish_reason"]["type"] for task in tasks]
        late = generating(server, session, server.prompt(3), 4)
        await asyncio.sleep(0.2)
        waits = not late.done()
        flushed = (await post(server, session, "/flush_cache")).status  # who waits has not reached the engine
        await post(server, session, "/continue_generation")
        return ended, waits, flushed, len((await late).json["output_ids"])

    assert server.client.run(work) == (["abort", "abort"], True, 200, 4)


def test_a_mode_that_is_none_is_refused(server):
    assert server.client.post("/pause_generation", {"mode": "nap"}).status == 400
    assert len(server.generate(server.prompt(), 2)["output_ids"]) == 2


# -------------------------------------------------------------------------------------------------- cache and memory


def test_a_flush_forgets_prefixes(server):
    prompt = server.prompt(40, length=64)
    server.generate(prompt, 2)
    assert server.client.post("/flush_cache").status == 200
    assert server.generate([*prompt, 1], 2)["meta_info"]["cached_tokens"] == 0


def test_a_flush_while_requests_run_is_refused(server):
    async def work(session):
        task = generating(server, session, server.prompt(4), server.long, rid="flushed")
        await begun(server, session, 1)
        status = (await post(server, session, "/flush_cache")).status
        while not task.done():
            await post(server, session, "/abort_request", {"rid": "flushed"})
            await asyncio.sleep(0.05)
        return status

    assert server.client.run(work) == 400
    if not server.ours:
        time.sleep(1)  # until the scheduler has noticed
    assert server.client.post("/flush_cache").status == 200


def test_memory_is_released_and_taken_again(server):
    if not server.info["enable_memory_saver"]:
        pytest.skip("needs --enable-memory-saver")
    before = server.generate(server.prompt(5), 8)
    server.come_to_rest()
    for tags in (["kv_cache"], *([["weights", "kv_cache", "cuda_graph"], None] if server.ours else [])):
        body = {} if tags is None else {"tags": tags}
        assert server.client.post("/release_memory_occupation", body).status == 200
        assert server.client.post("/resume_memory_occupation", body).status == 200
    assert server.generate(server.prompt(5), 8)["output_ids"] == before["output_ids"]


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_weight_version_is_told_with_every_answer(server):
    first = server.client.get("/model_info").json["weight_version"]
    for version in ("41", "forty-two"):
        reply = server.client.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})
        assert reply.json["new_version"] == version
        assert server.client.get("/model_info").json["weight_version"] == version
        assert server.generate(server.prompt(), 2)["meta_info"]["weight_version"] == version
    server.client.post("/update_weight_version", {"new_version": first, "abort_all_requests": False})


def test_weights_from_disk_are_served_under_their_version(server):
    if server.other is None:
        pytest.skip("MILES_SERVER_OTHER names no other checkpoint")
    prompt = server.prompt(50, length=12)
    first = server.client.get("/model_info").json["weight_version"]
    before = np.array([value for value, *_ in server.score(prompt)[1:]])
    server.come_to_rest()
    moved = server.client.post("/update_weights_from_disk", {"model_path": server.other, "weight_version": "9"})
    assert moved.json["success"] is True
    assert server.client.get("/model_info").json["weight_version"] == "9"
    assert server.generate(prompt, 2)["meta_info"]["weight_version"] == "9"
    other = np.array([value for value, *_ in server.score(prompt)[1:]])
    assert np.abs(other - before).max() > 0.1
    server.come_to_rest()
    back = server.client.post("/update_weights_from_disk", {"model_path": server.model_path, "weight_version": first})
    assert back.status == 200
    np.testing.assert_allclose([v for v, *_ in server.score(prompt)[1:]], before, atol=server.tolerance)


def test_an_update_while_paused_takes_effect_with_the_next_token(server):
    if server.other is None:
        pytest.skip("MILES_SERVER_OTHER names no other checkpoint")

    async def work(session):
        await post(server, session, "/pause_generation", {"mode": "abort"})
        task = generating(server, session, server.prompt(6), 4)
        body = {"model_path": server.other, "weight_version": "10"}
        moved = await post(server, session, "/update_weights_from_disk", body)
        await post(server, session, "/continue_generation")
        reply = (await task).json
        await post(server, session, "/flush_cache?timeout=30")  # as `come_to_rest`
        await post(
            server, session, "/update_weights_from_disk", {"model_path": server.model_path, "weight_version": "0"}
        )
        return moved.status, reply["meta_info"]["weight_version"]

    assert server.client.run(work) == (200, "10")


def test_an_update_that_cannot_be_leaves_everything_as_it_was(server, tmp_path):
    before = server.generate(server.prompt(7), 8)
    server.come_to_rest()
    for path in (str(tmp_path / "nowhere"), str(tmp_path)):
        reply = server.client.post("/update_weights_from_disk", {"model_path": path, "weight_version": "99"})
        assert reply.status == 400
        assert reply.json["success"] is False
        assert reply.json["message"]
    after = server.generate(server.prompt(7), 8)
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == before["meta_info"]["weight_version"]
