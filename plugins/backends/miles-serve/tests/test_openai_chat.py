"""The official `openai` package, unmodified, talks to /v1/chat/completions."""

import asyncio
import json
import time

import openai
import pytest

from miles.api import ConfigError, EngineError, EngineLostError
from miles.testing import tiny
from miles.testing.contract import installed

ASK = [{"role": "user", "content": "hello"}]
TOOLS = [
    {"type": "function", "function": {"description": "adds", "name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "größe"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "ü"]}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "größe", "arguments": {}}\n</tool_call>'


def client_of(server, **changes):
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "any", "max_retries": 0, "timeout": 30, **changes})


def ask(server, messages=ASK, **params):
    return client_of(server).chat.completions.create(model="tiny", messages=messages, **params)


def chunks_of(server, **params):
    return list(ask(server, stream=True, **params))


def deltas(chunks, name):
    return "".join(getattr(c.delta, name, None) or "" for chunk in chunks for c in chunk.choices)


# ------------------------------------------------------------------------------------------------------ whole answers


def test_an_answer(lab, playing):
    engine = lab.Scripted(("hello é you", "stop"))
    reply = ask(playing(engine), temperature=0.5, top_p=0.9, max_completion_tokens=40, seed=7, stop=["END"])
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello é you", "stop")
    assert choice.message.tool_calls is None
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    assert abs(reply.created - time.time()) < 60
    (request,) = engine.requests
    chat = engine.chat
    assert request.tokens == chat.render_prompt(ASK)
    assert (request.seed, reply.id) == (7, request.id)
    params = request.sampling
    assert (params.temperature, params.top_p, params.max_new_tokens, params.stop) == (0.5, 0.9, 40, ("END",))
    assert params.stop_token_ids == chat.stop_token_ids
    usage = reply.usage
    said = len(chat.render_text("hello é you")) + 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.tokens), said)
    assert (usage.total_tokens, usage.prompt_tokens_details.cached_tokens) == (len(request.tokens) + said, 2)


def test_extras_of_sglang_reach_the_engine(lab, playing):
    engine = lab.Scripted(("hello", "stop"))
    extras = {"top_k": 5, "min_p": 0.1, "min_tokens": 2, "stop_token_ids": [9], "ignore_eos": True, "rid": "mine"}
    reply = ask(playing(engine), user="me", metadata={"a": "b"}, extra_body=extras)
    (request,) = engine.requests
    params = request.sampling
    assert (params.top_k, params.min_p, params.min_new_tokens, params.stop_token_ids) == (5, 0.1, 2, (9,))
    assert request.id == reply.id == "mine"
    assert params.max_new_tokens == 1024 - len(request.tokens), (
        "without a limit there is as much room as the context has"
    )


def test_an_answer_gets_no_more_room_than_there_is(lab, playing):
    engine = lab.Scripted(("hello", "stop"))
    ask(playing(engine), max_tokens=100_000)
    assert engine.requests[0].sampling.max_new_tokens == 1024 - len(engine.requests[0].tokens)


def test_messages_of_every_kind(lab, playing):
    engine = lab.Scripted(("hello", "stop"))
    server = playing(engine)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ask(server, [{"role": "developer", "content": "brief"}, {"role": "user", "content": parts}])
    plain = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hello"}]
    assert engine.requests[0].tokens == engine.chat.render_prompt(plain)


def test_several_answers(lab, playing):
    engine = lab.Scripted(("one", "stop"), ("two", "length"))
    reply = ask(playing(engine), n=2, seed=7)
    assert {(choice.message.content, choice.finish_reason) for choice in reply.choices} == {
        ("one", "stop"),
        ("two", "length"),
    }
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [request.seed for request in engine.requests] == [7, 8]
    assert len({request.id for request in engine.requests}) == 2
    assert reply.usage.prompt_tokens == len(engine.requests[0].tokens), "the prompt is counted once"


def test_without_a_seed_every_answer_is_another(lab, playing):
    engine = lab.Scripted(("one", "stop"))
    server = playing(engine)
    ask(server, n=2)
    ask(server)
    assert len({request.seed for request in engine.requests}) == 3


def test_stop_strings_are_left_out(lab, playing):
    engine = lab.Scripted(("one END", "stop"))
    server = playing(engine)
    assert ask(server, stop="END").choices[0].message.content == "one "
    assert ask(server, stop="END", extra_body={"no_stop_trim": True}).choices[0].message.content == "one END"


def test_log_probs_name_tokens_and_their_bytes(lab, playing):
    engine = lab.Scripted(("hello é", "stop"))
    server = playing(engine)
    content = ask(server, logprobs=True, top_logprobs=0).choices[0].logprobs.content
    assert [entry.bytes for entry in content[:4]] == [list(b"hello"), list(b" "), [0xC3], [0xA9]]
    assert [entry.token for entry in content] == ["hello", " ", "\ufffd", "\ufffd", tiny.TURN_END]
    assert [entry.logprob for entry in content] == [-0.25, -0.5, -0.75, -1.0, -1.25]
    assert all(entry.top_logprobs == [] for entry in content)
    ids = ask(server, logprobs=True, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs.content
    assert ids[0].token == f"token_id:{engine.chat.render_text('hello')[0]}"


def test_exact_tokens_for_those_who_train_on_them(lab, playing):
    engine = lab.Scripted(("hello", "stop"))
    server = playing(engine)
    given = [5, 6, 7]
    extras = {"input_ids": given, "return_token_ids": True, "return_meta_info": True}
    choice = ask(server, logprobs=True, extra_body=extras).choices[0]
    said = [*engine.chat.render_text("hello"), engine.chat.stop_token_ids[0]]
    assert engine.requests[0].tokens == choice.prompt_token_ids == given
    assert choice.token_ids == said
    meta = choice.meta_info
    assert [entry[:2] for entry in meta["output_token_logprobs"]] == [[-0.25, said[0]], [-0.5, said[1]]]
    assert meta["finish_reason"] == {"type": "stop", "matched": said[-1]}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (3, 2, "3")
    assert "e2e_latency" not in meta


# --------------------------------------------------------------------------------------------- tools and reasoning


def test_tools_there_and_back(lab, playing):
    engine = lab.Scripted((f"<think>\nhm\n</think>\n\nlet me see\n{CALL}\n{OTHER}", "stop"), ("so 3", "stop"))
    server = playing(engine)
    choice = ask(server, tools=TOOLS, tool_choice="auto").choices[0]
    assert engine.requests[0].tokens == engine.chat.render_prompt(ASK, TOOLS)
    message = choice.message
    assert (message.content, message.reasoning_content, choice.finish_reason) == ("let me see", "hm", "tool_calls")
    first, second = message.tool_calls
    assert (first.type, first.function.name, json.loads(first.function.arguments)) == (
        "function",
        "add",
        {"a": [1, "ü"]},
    )
    assert (second.function.name, second.function.arguments) == ("größe", "{}")
    assert first.id != second.id
    results = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in message.tool_calls]
    after = ask(server, [*ASK, message, *results], tools=TOOLS).choices[0]
    assert (after.message.content, after.finish_reason) == ("so 3", "stop")
    seen = engine.chat.tokenizer.decode(engine.requests[1].tokens)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": [1, "ü"]}}\n</tool_call>' in seen
    assert seen.count("<|im_start|>tool\n3") == 2
    again = ask(server, tools=TOOLS).choices[0]
    assert again.message.tool_calls is None


def test_ids_of_calls_are_new_every_time(lab, playing):
    server = playing(lab.Scripted((CALL, "stop")))
    choices = [*ask(server, tools=TOOLS, n=2).choices, *ask(server, tools=TOOLS).choices]
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3
    assert choices[0].message.content is None


def test_a_malformed_call_is_content(lab, playing):
    server = playing(lab.Scripted((f"so <tool_call>\n{{broken\n</tool_call>\n{CALL}", "stop")))
    message = ask(server, tools=TOOLS).choices[0].message
    assert message.content == "so <tool_call>\n{broken\n</tool_call>"
    assert [call.function.name for call in message.tool_calls] == ["add"]


def test_an_unfinished_call_is_content(lab, playing):
    choice = ask(playing(lab.Scripted(("<tool_call>\n{", "length"))), tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("<tool_call>\n{", None)
    assert choice.finish_reason == "length"


def test_tools_that_may_not_be_called_are_not_shown(lab, playing):
    engine = lab.Scripted((CALL, "stop"))
    choice = ask(playing(engine), tools=TOOLS, tool_choice="none").choices[0]
    assert engine.requests[0].tokens == engine.chat.render_prompt(ASK)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_a_single_call_ends_the_answer(lab, playing):
    engine = lab.Scripted((CALL, "stop"))
    choice = ask(playing(engine), tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert engine.requests[0].sampling.stop == ("</tool_call>",)
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]


# ------------------------------------------------------------------------------------------------------------ streams


def test_a_stream_is_the_answer_in_pieces(lab, playing):
    engine = lab.Scripted((f"<think>\nhm so\n</think>\n\nlet é me\n{CALL}\n{OTHER}", "stop"))
    server = playing(engine)
    whole = ask(server, tools=TOOLS)
    chunks = chunks_of(server, tools=TOOLS, stream_options={"include_usage": True})
    assert {(chunk.object, chunk.model, chunk.id) for chunk in chunks} == {
        ("chat.completion.chunk", "tiny", chunks[0].id)
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    message = whole.choices[0].message
    assert deltas(chunks, "content") == message.content
    assert deltas(chunks, "reasoning_content") == message.reasoning_content
    calls = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
    assert [(call.index, call.type) for call in calls] == [(0, "function"), (1, "function")]
    assert [call.function for call in calls] == [
        openai.types.chat.chat_completion_chunk.ChoiceDeltaToolCallFunction(**call.function.model_dump())
        for call in message.tool_calls
    ]
    assert len({call.id for call in calls}) == 2
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_piece_splits_a_character_or_shows_a_tag_or_a_stop_string(lab, playing):
    text = f"größe 🧮 <b> one{CALL} two END"
    server = playing(lab.Scripted((text, "stop")))
    chunks = chunks_of(server, tools=TOOLS, stop=["END"])
    contents = [c.delta.content for chunk in chunks for c in chunk.choices if c.delta.content]
    assert "".join(contents) == "größe 🧮 <b> one two"
    assert all("\ufffd" not in content and "tool" not in content and "E" not in content for content in contents)
    assert " 🧮" in contents


def test_pieces_come_as_they_are_made(lab, playing):
    engine = lab.Scripted(("abc", "stop"), patience=0.2)
    arrived = []
    for chunk in ask(playing(engine), stream=True):
        arrived += [time.monotonic() for c in chunk.choices if c.delta.content]
    assert len(arrived) == 3
    assert arrived[-1] - arrived[0] > 0.2


def test_streams_side_by_side(lab, playing):
    chunks = chunks_of(playing(lab.Scripted(("one", "stop"), ("two", "length"))), n=2)
    said = {i: "".join(c.delta.content or "" for k in chunks for c in k.choices if c.index == i) for i in (0, 1)}
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert {(said[i], ends[i]) for i in (0, 1)} == {("one", "stop"), ("two", "length")}
    assert [c.index for chunk in chunks for c in chunk.choices if c.delta.role] in ([0, 1], [1, 0])


def test_log_probs_and_tokens_in_a_stream(lab, playing):
    engine = lab.Scripted(("hello é<tool_call>", "stop"))
    chunks = chunks_of(playing(engine), logprobs=True, extra_body={"return_token_ids": True})
    choices = [c for chunk in chunks for c in chunk.choices]
    told = [entry.logprob for c in choices if c.logprobs for entry in c.logprobs.content]
    assert told == [-0.25, -0.5, -0.75, -1.0, -1.25, -1.5]
    tokens = [token for c in choices for token in getattr(c, "token_ids", None) or []]
    assert tokens == [*engine.chat.render_text("hello é<tool_call>"), engine.chat.stop_token_ids[0]]
    assert [c.prompt_token_ids for c in choices if hasattr(c, "prompt_token_ids")] == [engine.requests[0].tokens]


def test_a_client_that_leaves_takes_its_request_along(lab, playing):
    engine = lab.Scripted(("abcdefghij" * 5, "stop"), patience=0.02)
    server = playing(engine)
    with ask(server, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    deadline = time.monotonic() + 10
    while not engine.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.left == [engine.requests[0].id]
    engine.left.clear()
    with pytest.raises(openai.APITimeoutError):
        client_of(server, timeout=0.1).chat.completions.create(model="tiny", messages=ASK)
    while not engine.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.left == [engine.requests[1].id]


def test_the_asynchronous_client(lab, playing):
    server = playing(lab.Scripted(("hello", "stop")))

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            create = client.chat.completions.create
            replies = await asyncio.gather(*(create(model="tiny", messages=ASK) for _ in range(8)))
            streamed = [chunk async for chunk in await create(model="tiny", messages=ASK, stream=True)]
            return replies, streamed

    replies, streamed = asyncio.run(main())
    assert [reply.choices[0].message.content for reply in replies] == ["hello"] * 8
    assert deltas(streamed, "content") == "hello"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("params", "param", "says"),
    [
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs", "not how likely others were"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "no call can be enforced"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", "enforced"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be constrained"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "own distribution"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "own distribution"),
        ({"extra_body": {"temprature": 1}}, "temprature", "Did you mean temperature?"),
        ({"extra_body": {"regex": "a+"}}, "regex", "cannot be constrained"),
        ({"stream": True, "extra_body": {"return_meta_info": True}}, "return_meta_info", "leave out stream"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "name"),
        ({"messages": [{"role": "auditor", "content": "?"}]}, "messages", "role"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"extra_body": {"input_ids": [1, 9999]}}, None, "outside of the vocabulary"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(lab, playing, params, param, says):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(playing(lab.Scripted(("x", "stop"))), **params)
    body = refused.value.body
    assert says in body["message"]
    assert body["type"] == "invalid_request_error"
    assert (body["param"] or "").partition(".")[0] == (param or "")


def test_images_are_refused(lab, playing):
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError, match="'image_url' are not supported"):
        ask(playing(lab.Scripted(("x", "stop"))), [{"role": "user", "content": [image]}])


def test_asking_for_what_is_done_anyway_is_fine(lab, playing):
    server = playing(lab.Scripted(("x", "stop")))
    harmless = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    assert ask(server, **harmless, modalities=["text"], store=False, service_tier="auto").choices


def test_a_prompt_that_is_too_long(lab, playing):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(playing(lab.Scripted(("x", "stop"))), [{"role": "user", "content": "x" * 2000}])
    assert refused.value.code == "context_length_exceeded"


def test_a_model_that_is_not_there(lab, playing):
    server = playing(lab.Scripted(("x", "stop")))
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; this server has 'tiny'") as missing:
        client_of(server).chat.completions.create(model="gpt-4", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client_of(server).models.retrieve("gpt-4")


def test_models(lab, playing):
    client = client_of(playing(lab.Scripted(("x", "stop"))))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "miles"
    assert client.models.retrieve("/models/tiny").max_model_len == 1024


def test_the_key(lab, playing):
    server = playing(lab.Scripted(("x", "stop")), api_key="secret")
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        ask(server)
    client = client_of(server, api_key="secret")
    assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].message.content == "x"


@pytest.mark.parametrize("error", [EngineLostError("its server died"), EngineError("it is asleep")])
def test_an_engine_that_cannot_answer(lab, playing, error):
    engine = lab.Scripted(("abcdef", "stop"), fails=error)
    with pytest.raises(openai.InternalServerError, match=str(error)) as unavailable:
        ask(playing(engine))
    assert unavailable.value.status_code == 503


def test_an_engine_that_is_lost_in_the_middle_of_a_stream(lab, playing):
    """What was said was said; the client hears that it is no answer."""
    server = playing(lab.Scripted(("abcdef", "stop"), fails=EngineLostError("its server died")))
    stream = ask(server, stream=True)
    heard = [next(stream) for _ in range(3)]
    assert deltas(heard, "content") == "ab"
    with pytest.raises(openai.APIError, match="its server died"):
        next(stream)


def test_options_of_the_template(lab, playing):
    engine = lab.Scripted(("x", "stop"))
    given = []

    def chat_with(kwargs):
        given.append(dict(kwargs))
        return tiny.chat_format(installed())

    server = playing(engine, chat_with=chat_with)
    ask(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert given == [{"enable_thinking": False}]
    with pytest.raises(openai.BadRequestError, match="a cannot be set here"):
        ask(playing(engine), extra_body={"chat_template_kwargs": {"a": 1}})
    with pytest.raises(openai.BadRequestError, match="chat_template cannot be set here"):
        ask(server, extra_body={"chat_template_kwargs": {"chat_template": "{{ 'mine' }}", "enable_thinking": False}})


def test_options_that_the_chat_format_does_not_know(lab, playing):
    def chat_with(kwargs):
        raise ConfigError("it knows enable_thinking")

    with pytest.raises(openai.BadRequestError, match="it knows enable_thinking") as refused:
        ask(playing(lab.Scripted(("x", "stop")), chat_with=chat_with), extra_body={"chat_template_kwargs": {"a": 1}})
    assert refused.value.param == "chat_template_kwargs"


def test_messages_that_the_chat_format_does_not_take(lab, playing):
    chat = tiny.chat_format(installed())
    chat.tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(openai.BadRequestError, match="no tools here") as refused:
        ask(playing(lab.Scripted(("x", "stop")), chat=chat))
    assert refused.value.param == "messages"


# ------------------------------------------------------------------------------------------------- with a real engine


def test_the_torch_engine_behind_it(shared):
    """Greedy answers, whole and in pieces, are the same, and their log-probs too."""
    params = {"temperature": 0, "max_tokens": 12, "logprobs": True, "extra_body": {"return_token_ids": True}}
    whole = ask(shared, **params).choices[0]
    chunks = [c for chunk in chunks_of(shared, **params) for c in chunk.choices]
    assert [token for c in chunks for token in getattr(c, "token_ids", None) or []] == whole.token_ids
    assert "".join(c.delta.content or "" for c in chunks) == whole.message.content
    told = [entry.logprob for c in chunks if c.logprobs for entry in c.logprobs.content]
    assert told == pytest.approx([entry.logprob for entry in whole.logprobs.content], abs=1e-5)
    assert 1 <= len(whole.token_ids) <= 12
