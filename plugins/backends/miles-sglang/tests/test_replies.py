"""Replies of a real SGLang 0.5.17, and what is no answer."""

import base64
import json

import numpy as np
import pytest
from fake_server import RECORDED
from miles_sglang.client import MalformedError
from miles_sglang.replies import Answer, Piece, Reader

from miles.api import EngineError, GenerateRequest, Routing, SamplingParams

ROUTING = Routing(layers=2, top_k=2, experts=64)


def read(reply, first=True, truncates=False, vocabulary=1024, rid=None):
    return Reader(rid or reply["meta_info"]["id"], vocabulary, truncates).read(reply, first)


def recorded(name, **options):
    return read(RECORDED[name], **options)


def rows(*numbers):
    """Expert choices as a reply brings them: each row is of one number."""
    array = np.broadcast_to(np.array(numbers, np.int32)[:, None, None], (len(numbers), 2, 2))
    return base64.b64encode(array.tobytes()).decode()


def answer(prompt=3, **options):
    request = GenerateRequest("1", list(range(prompt)), SamplingParams(), routed_experts=True, **options)
    return Answer(request, ROUTING)


def piece(tokens, version=0, finish="length", experts=None):
    return Piece(list(tokens), [-1.0] * len(tokens), version, finish, experts)


# ------------------------------------------------------------------------------------------- replies of a real server


def test_a_generation_has_a_log_prob_for_each_token_and_a_version():
    reply, found = RECORDED["length"], recorded("length")
    assert found.tokens == reply["output_ids"] == [row[1] for row in reply["meta_info"]["output_token_logprobs"]]
    assert found.log_probs == [row[0] for row in reply["meta_info"]["output_token_logprobs"]]
    assert found.version == int(reply["meta_info"]["weight_version"])
    assert found.finish_reason == "length"


def test_a_stop_keeps_the_stop_token():
    assert recorded("stop").finish_reason == "stop"
    assert recorded("stop").tokens[-1] == RECORDED["stop"]["meta_info"]["finish_reason"]["matched"]


def test_truncated_sampling_reads_the_log_probs_of_the_truncated_distribution():
    meta = RECORDED["top_p"]["meta_info"]
    found = recorded("top_p", truncates=True)
    assert found.log_probs == meta["output_token_sampling_logprobs"]
    assert all(cut >= full for cut, (full, *_) in zip(found.log_probs, meta["output_token_logprobs"], strict=True))


def test_a_server_that_does_not_know_the_truncated_distribution_is_an_error():
    with pytest.raises(EngineError, match="top_p") as raised:
        recorded("length", truncates=True)
    assert not isinstance(raised.value, MalformedError), "trying again would not help"


def test_prompt_scores_begin_with_nothing():
    scores = recorded("score").prompt_log_probs
    assert scores[0] == 0.0
    assert all(score < 0 for score in scores[1:])


def test_experts_have_one_row_fewer_than_tokens():
    reply = RECORDED["experts"]
    tokens = reply["meta_info"]["prompt_tokens"] + len(reply["output_ids"])
    request = GenerateRequest(
        "1", list(range(reply["meta_info"]["prompt_tokens"])), SamplingParams(), routed_experts=True
    )
    whole = Answer(request, Routing(layers=4, top_k=4, experts=16))
    whole.add(recorded("experts"))
    found = whole.result().routed_experts
    assert found.shape == (tokens - 1, 4, 4)
    assert found.dtype == np.uint8
    assert all(len(set(chosen)) == 4 for chosen in found.reshape(-1, 4).tolist())


@pytest.mark.parametrize("name", ["abort", "abort queued"])
def test_aborts_return_what_there_was(name):
    found = recorded(name)
    assert found.finish_reason == "abort"
    assert len(found.tokens) == len(found.log_probs) > 0


def test_the_echo_of_an_abort_in_the_queue_repeats_nothing():
    found = recorded("abort queued", first=False)
    assert (found.tokens, found.log_probs, found.finish_reason) == ([], [], "abort")


def test_a_stream_adds_up_to_the_whole_answer():
    chunks = [json.loads(line[6:]) for line in RECORDED["stream"].splitlines() if line.startswith("data: {")]
    whole = Answer(GenerateRequest("1", [1], SamplingParams()))
    for index, chunk in enumerate(chunks):
        last = read(chunk, first=index == 0)
        whole.add(last)
    assert len(whole.tokens) == len(whole.log_probs) == len(whole.versions) == 3
    assert last.finish_reason == "length"


# ---------------------------------------------------------------------------------------------------- what is no answer


def test_nan_logits_are_an_error_although_sglang_calls_them_a_stop():
    meta = {"id": "1", "finish_reason": {"type": "stop", "matched": "NaN happened"}}
    with pytest.raises(EngineError, match="NaN") as raised:
        read({"output_ids": [], "meta_info": meta})
    assert not isinstance(raised.value, MalformedError)


def test_an_error_in_a_stream_is_the_requests():
    with pytest.raises(EngineError, match="too long"):
        Reader("1", 1024).read({"error": {"message": "too long"}})


GOOD = RECORDED["length"]
META = GOOD["meta_info"]


@pytest.mark.parametrize(
    ("reply", "quoted"),
    [
        ("a page", "a page"),
        (["a list"], "a list"),
        (None, "None"),
        ({}, "output_ids|meta_info"),
        ({"output_ids": [1]}, "meta_info"),
        (GOOD | {"output_ids": None}, "log-prob|NoneType"),
        (GOOD | {"output_ids": GOOD["output_ids"][:-1]}, "5 tokens with 6 log-probabilities"),
        (GOOD | {"output_ids": [*GOOD["output_ids"][:-1], 1024]}, r"vocabulary \[0, 1024\)"),
        (GOOD | {"output_ids": [*GOOD["output_ids"][:-1], -1]}, "vocabulary"),
        (GOOD | {"output_ids": [*GOOD["output_ids"][:-1], "x"]}, "TypeError"),
        (GOOD | {"meta_info": META | {"output_token_logprobs": [[float("nan"), 1, None]] * 6}}, "finite"),
        (GOOD | {"meta_info": META | {"output_token_logprobs": [[None, 1, None]] * 6}}, "TypeError"),
        (GOOD | {"meta_info": META | {"finish_reason": {"type": "whim"}}}, "whim"),
        (GOOD | {"meta_info": META | {"id": "another"}}, "another"),
    ],
)
def test_what_is_no_answer_is_quoted(reply, quoted):
    with pytest.raises(MalformedError, match=quoted):
        Reader(META["id"], 1024).read(reply)


# ------------------------------------------------------------------------------------------------------- expert choices


def test_rows_of_several_pieces_are_joined_and_asked_for_from_where_they_end():
    whole = answer(prompt=3)
    assert whole.experts_from == 0
    whole.add(piece([10, 11], 0, "abort", rows(0, 1, 2, 3)))
    assert whole.experts_from == 4
    whole.ask_on()
    whole.add(piece([12], 1, experts=rows(4)))
    assert whole.result().routed_experts[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_rows_begin_where_the_request_says():
    whole = answer(prompt=3, routed_experts_from=2)
    whole.add(piece([10], experts=rows(2)))
    assert whole.result().routed_experts[:, 0, 0].tolist() == [2]


def test_rows_that_were_lost_and_computed_by_other_weights_are_void():
    """Two tokens of version 0 came without their rows; the next piece, of version 1, brings all. Rows 2 and 3 predicted
    them (of a prompt of three, row 2 predicts the first token)."""
    whole = answer(prompt=3)
    whole.add(piece([10, 11], 0, "abort"))
    whole.ask_on()
    whole.add(piece([12], 1, experts=rows(0, 1, 2, 3, 4)))
    assert whole.result().routed_experts[:, 0, 0].tolist() == [0, 1, 255, 255, 4]


def test_rows_that_were_lost_and_computed_by_the_same_weights_count():
    whole = answer(prompt=3)
    whole.add(piece([10, 11], 1, "abort"))
    whole.ask_on()
    whole.add(piece([12], 1, experts=rows(0, 1, 2, 3, 4)))
    assert whole.result().routed_experts[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_rows_of_a_stream_are_those_of_its_tokens_whatever_their_versions():
    whole = answer(prompt=2)
    whole.add(piece([10], 0, ""))
    whole.add(piece([11], 1, experts=rows(0, 1, 2)))
    assert whole.result().routed_experts[:, 0, 0].tolist() == [0, 1, 2]


def test_rows_that_were_lost_in_the_end_are_none():
    whole = answer(prompt=3)
    whole.add(piece([10], 0, "abort"))
    assert whole.result().routed_experts is None


@pytest.mark.parametrize("sent", [rows(0, 1), rows(0, 1, 64), rows(0, 1, 2)[:-4], "no base64!"])
def test_rows_that_do_not_go_with_the_tokens_are_malformed(sent):
    whole = answer(prompt=3)
    with pytest.raises(MalformedError, match=r"not \[3, 2, 2\]"):
        whole.add(piece([10], experts=sent))
    assert whole.tokens == [], "nothing of a malformed answer is kept"
