"""`/generate` with `stream`: server-sent events, each a reply."""

import pytest


def stream(server, tokens, length=16, **more):
    reply = server.client.post("/generate", server.body(tokens, length, stream=True, **more))
    assert reply.status == 200, reply.text
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert reply.events[-1] == "[DONE]"
    return reply.events[:-1]


def joined(server, pieces, name="output_ids"):
    """As one answer: pieces hold what is new, or everything so far."""
    if not server.info["incremental_streaming_output"]:
        return pieces[-1][name]
    parts = [piece[name] for piece in pieces]
    return "".join(parts) if name == "text" else [item for part in parts for item in part]


def test_pieces_make_up_the_answer(server):
    prompt = server.prompt(20)
    whole = server.generate(prompt, 24)
    pieces = stream(server, prompt, 24)
    assert joined(server, pieces) == whole["output_ids"]
    assert len(pieces) > 1
    assert [piece["meta_info"]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 24}
    counts = [piece["meta_info"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 24
    if server.text:
        assert joined(server, pieces, "text") == whole["text"]


def test_every_piece_has_its_log_probs(server):
    pieces = stream(server, server.prompt(21))
    for piece in pieces:
        assert [row[1] for row in piece["meta_info"]["output_token_logprobs"]] == piece["output_ids"]


def test_a_batch_is_told_apart_by_its_index(server):
    prompts = [server.prompt(i) for i in (22, 23, 24)]
    whole = server.generate(prompts, 8)
    pieces = stream(server, prompts, 8)
    assert {piece["index"] for piece in pieces} == {0, 1, 2}
    for i, reply in enumerate(whole):
        own = [piece for piece in pieces if piece["index"] == i]
        assert len(joined(server, own)) == len(reply["output_ids"])
        assert own[-1]["meta_info"]["finish_reason"] is not None


def test_no_piece_holds_a_whole_stop_string(server):
    if not server.text:
        pytest.skip("needs a server with a tokenizer")
    prompt = server.prompt(25)
    whole = server.generate(prompt, 40)["text"]
    start = next(i for i in range(3, len(whole)) if whole[i : i + 2].isalnum() and len(whole[i : i + 2]) == 2)
    stop = whole[start : start + 2]
    pieces = stream(server, prompt, 40, stop=[stop])
    said, until = joined(server, pieces, "text"), whole[: whole.index(stop)]
    assert said == until or (not server.ours and said == until + stop[0]), "SGLang has told the first of two tokens"
    assert pieces[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_request_that_is_refused_says_so_before_or_in_the_stream(server):
    body = server.body(server.prompt(), 4, stream=True) | {"input_ids": server.prompt(length=server.context + 4)}
    reply = server.client.post("/generate", body)
    assert reply.status == 400 or "error" in reply.events[0]
