"""The official `openai` package, unmodified, talks to /v1/completions."""

import openai
import pytest

from miles.api import EngineLostError
from miles.testing import tiny


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30)


def ask(server, prompt="hello", **params):
    return client_of(server).completions.create(model="tiny", prompt=prompt, **params)


def test_text_that_goes_on(lab, playing):
    engine = lab.Scripted((" you é", "stop"))
    reply = ask(playing(engine), max_tokens=40, temperature=0.5, seed=7, stop=["END"])
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (" you é", "stop", None)
    assert (reply.object, reply.model) == ("text_completion", "tiny")
    (request,) = engine.requests
    assert request.tokens == engine.chat.render_text("hello")
    assert (request.seed, request.sampling.temperature, request.sampling.stop) == (7, 0.5, ("END",))
    assert request.sampling.stop_token_ids == engine.chat.stop_token_ids
    said = len(engine.chat.render_text(" you é")) + 1
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(request.tokens), said)


def test_without_a_limit_it_is_sixteen_tokens(lab, playing):
    engine = lab.Scripted(("x" * 50, "stop"))
    choice = ask(playing(engine)).choices[0]
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


@pytest.mark.parametrize(
    ("prompt", "texts"), [(["hello", "he"], ["hello", "he"]), ([[5, 6], [7]], None), ([5, 6, 7], None)]
)
def test_prompts_as_texts_and_as_tokens(lab, playing, prompt, texts):
    engine = lab.Scripted(("a", "stop"), ("b", "stop"))
    reply = ask(playing(engine), prompt, n=2)
    nested = [engine.chat.render_text(text) for text in texts] if texts else prompt
    nested = nested if isinstance(nested[0], list) else [nested]
    by_id = sorted(engine.requests, key=lambda request: request.id)
    assert [request.tokens for request in by_id] == [tokens for tokens in nested for _ in range(2)]
    assert [choice.index for choice in reply.choices] == list(range(2 * len(nested)))
    assert reply.usage.prompt_tokens == sum(map(len, nested))


def test_stop_strings_and_special_tokens_are_left_out(lab, playing):
    server = playing(lab.Scripted((f"one{tiny.TURN_BEGIN} END", "stop")))
    assert ask(server, stop="END").choices[0].text == "one "
    assert ask(server, stop="END", extra_body={"no_stop_trim": True}).choices[0].text == "one END"


def test_log_probs(lab, playing):
    told = ask(playing(lab.Scripted((" é hello", "stop"))), logprobs=0).choices[0].logprobs
    assert told.tokens == [" ", "\ufffd", "\ufffd", " ", "hello", tiny.TURN_END]
    assert told.token_logprobs == [-0.25, -0.5, -0.75, -1.0, -1.25, -1.5]
    assert told.text_offset == [0, 1, 1, 2, 3, 8]
    assert told.top_logprobs is None


def test_the_prompt_is_echoed_and_scored(lab, playing):
    engine = lab.Scripted((" you", "stop"))
    choice = ask(playing(engine), "hello é", echo=True, logprobs=0).choices[0]
    assert choice.text == "hello é you"
    told = choice.logprobs
    assert told.tokens[:4] == ["hello", " ", "\ufffd", "\ufffd"]
    assert told.token_logprobs[:5] == [None, -1.0, -2.0, -3.0, -0.25]
    assert told.text_offset[:6] == [0, 5, 6, 6, 7, 8]


def test_a_prompt_that_is_only_scored(lab, playing):
    engine = lab.Scripted(("x", "stop"))
    reply = ask(playing(engine), [5, 6, 7], echo=True, logprobs=0, max_tokens=0)
    assert engine.requests == []
    choice = reply.choices[0]
    assert (choice.logprobs.token_logprobs, choice.finish_reason) == ([None, -1.0, -2.0], "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 0)


def test_exact_tokens(lab, playing):
    engine = lab.Scripted(("you", "stop"))
    extras = {"return_token_ids": True, "return_meta_info": True}
    choice = ask(playing(engine), [5, 6], extra_body=extras, logprobs=0).choices[0]
    said = [*engine.chat.render_text("you"), engine.chat.stop_token_ids[0]]
    assert (choice.prompt_token_ids, choice.token_ids) == ([5, 6], said)
    assert [entry[1] for entry in choice.meta_info["output_token_logprobs"]] == said


def test_a_stream_is_the_text_in_pieces(lab, playing):
    engine = lab.Scripted((" you é 🧮 END", "stop"))
    params = {"max_tokens": 40, "stop": ["END"], "echo": True, "logprobs": 0}
    server = playing(engine)
    whole = ask(server, **params)
    chunks = list(ask(server, **params, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text == "hello you é 🧮 "
    assert all("\ufffd" not in choice.text and "E" not in choice.text for choice in choices)
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert [value for t in told for value in t.token_logprobs] == whole.choices[0].logprobs.token_logprobs
    assert [offset for t in told for offset in t.text_offset] == whole.choices[0].logprobs.text_offset
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logprobs": 2}, "logprobs"),
        ({"suffix": "END"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, None),
        ({"prompt": [9999]}, None),
        ({"presence_penalty": 1}, "presence_penalty"),
    ],
)
def test_what_cannot_be_done_is_refused(lab, playing, params, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(playing(lab.Scripted(("x", "stop"))), **params)
    assert refused.value.param == param


def test_an_engine_that_is_lost(lab, playing):
    with pytest.raises(openai.InternalServerError, match="its server died"):
        ask(playing(lab.Scripted(("abcdef", "stop"), fails=EngineLostError("its server died"))))


def test_scores_are_those_of_the_torch_engine(shared):
    """Echoed log-probs are what a transformers model of the same weights says."""
    tokens = [5, 17, 3, 200, 9]
    told = ask(shared, tokens, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    expected = tiny.log_probs_of(tiny.model(tiny.hf_config("llama")), tokens)
    assert told.token_logprobs[1:] == pytest.approx(expected[1:].tolist(), abs=1e-4)
