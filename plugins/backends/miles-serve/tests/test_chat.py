"""The chat layer, without HTTP: what goes in, what comes out, and the tokens between."""

import asyncio

import numpy as np
import pytest
from miles_serve.chat import ChatLayer, joined
from miles_serve.vocabulary import Vocabulary

from miles.api import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    WEIGHT_VERSION,
    ChatContext,
    DataError,
    GenerateRequest,
    GenerateResult,
    Prompt,
    Sample,
    SamplingParams,
)
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

ASK = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = [{"role": "tool", "content": "3"}]
THINKS = tiny.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def make(engine, template=tiny.CHATML, name="template"):
    tokenizer = tiny.tokenizer(template)
    chat = installed().build("chat_formats", Spec(name=name), context=ChatContext(tokenizer))
    return ChatLayer(chat, Vocabulary(tokenizer), engine.generate, engine.stream)


def asked(layer, prompt, **sampling):
    return GenerateRequest("r", prompt, layer.sampling(SamplingParams(**{"max_new_tokens": 99, **sampling})))


def answer(layer, prompt, **sampling):
    return asyncio.run(layer.answer(asked(layer, prompt, **sampling)))


def streamed(layer, prompt, calls=True, **sampling):
    async def main():
        return [piece async for piece in layer.stream(asked(layer, prompt, **sampling), calls=calls)]

    return asyncio.run(main())


def told(said):
    """Text, reasoning and names of calls."""
    pick = {kind: "".join(s.text for s in said if s.kind == kind) for kind in ("text", "reasoning")}
    return pick["text"], pick["reasoning"], [s.call.name for s in said if s.call]


def test_an_answer_has_everything_of_a_turn(lab):
    layer = make(lab.Scripted(("<think>hm</think>hello you", "stop")))
    turn = answer(layer, layer.prompt(ASK, TOOLS))
    assert turn.request.tokens == layer.chat.render_prompt(ASK, TOOLS)
    assert (turn.action.text, turn.action.reasoning, turn.action.finish_reason) == ("hello you", "hm", "stop")
    assert turn.tokens == turn.request.tokens + turn.result.tokens
    assert turn.result.tokens[-1] == layer.chat.end_of_turn_id
    assert turn.result.log_probs == [-0.25 * (i + 1) for i in range(len(turn.result.tokens))]
    assert turn.result.weight_versions == [3] * len(turn.result.tokens)


def test_the_format_says_where_an_answer_ends():
    layer = make(type("E", (), {"generate": None, "stream": None}))
    params = layer.sampling(SamplingParams(stop_token_ids=(5,)))
    assert params.stop_token_ids == (5, *layer.chat.stop_token_ids)
    assert layer.sampling(params) == params


def test_nothing_said_is_tokenised_again(lab):
    """The next prompt begins with the very tokens of the turns before, whichever they were."""
    odd = [*tiny.tokenizer().convert_tokens_to_ids(["h", "e", "l", "l"]), tiny.tokenizer().convert_tokens_to_ids("o")]
    layer = make(lab.Scripted((CALL, "stop")))
    first = answer(layer, layer.prompt(ASK, TOOLS))
    following = layer.prompt(TOOL, earlier=first.tokens)
    assert following[: len(first.tokens)] == first.tokens
    assert following[len(first.tokens) :] == layer.chat.render_next(TOOL)
    unfinished = layer.prompt(TOOL, earlier=[*first.request.tokens, *odd])
    end = len(first.request.tokens) + len(odd)
    assert unfinished[:end] == [*first.request.tokens, *odd]
    assert unfinished[end] == layer.chat.end_of_turn_id


def test_answers_become_a_training_sample(lab):
    """The other rendering of an answer, besides a reply to a client."""
    layer = make(lab.Scripted((CALL, "stop"), ("so 3", "length")))
    first = answer(layer, layer.prompt(ASK, TOOLS))
    second = answer(layer, layer.prompt(TOOL, earlier=first.tokens))
    sample = Sample.begin(Prompt("p", "s", messages=ASK, tokens=first.request.tokens), id=1, group_id=1)
    for turn in (first, second):
        sample.append(turn.request.tokens[len(sample.tokens) :])
        result = turn.result
        sample.append(
            result.tokens,
            {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: result.log_probs, WEIGHT_VERSION: result.weight_versions},
        )
    assert sample.tokens == second.tokens
    said = np.array([*first.result.log_probs, *second.result.log_probs], np.float32)
    assert (sample.columns["rollout_log_probs"][sample.loss_mask > 0] == said).all()
    assert sample.trainable_tokens == len(said)


@pytest.mark.parametrize("name", ["template", "qwen3"])
@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("hello é you", "stop", ("hello é you", "", [])),
        (f"<think>\nhm\n</think>\n\nso\n{CALL}", "stop", ("so", "hm", ["add"])),
        (f"{CALL}\n{CALL}", "stop", ("", "", ["add", "add"])),
        ("<tool_call>\n{broken", "length", ("<tool_call>\n{broken", "", [])),
        ("<think>never", "length", ("", "never", [])),
        ("", "stop", ("", "", [])),
    ],
)
def test_a_stream_says_what_the_answer_says(lab, name, text, reason, expected):
    layer = make(lab.Scripted((text, reason)), template=None if name == "qwen3" else tiny.CHATML, name=name)
    prompt = layer.prompt(ASK)
    whole, pieces = answer(layer, prompt), streamed(layer, prompt)
    assert told(layer.said(whole)) == expected
    assert told([said for piece in pieces for said in piece.said]) == expected
    assert [piece.answer for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].answer == whole
    assert (
        whole.action.tool_calls == ()
        or [call.name for call in whole.action.tool_calls if not call.error] == expected[2]
    )


def test_a_call_that_nobody_offered_is_text(lab):
    layer = make(lab.Scripted((CALL, "stop")))
    pieces = streamed(layer, layer.prompt(ASK), calls=False)
    assert told([said for piece in pieces for said in piece.said]) == (CALL, "", [])


def test_reasoning_that_the_prompt_opens(lab):
    """Models that always think are given the opening tag: what they say is reasoning until they close it."""
    layer = make(lab.Scripted(("hm\n</think>\n\nyes", "stop"), ("hm and", "length"), ("yes", "stop")), THINKS)
    prompt = layer.prompt(ASK)
    assert layer.vocabulary.text_of(layer.opening(prompt)[0]) == "<think>"
    closed, cut = answer(layer, prompt), answer(layer, prompt)
    assert (closed.action.reasoning, closed.action.text) == ("hm", "yes")
    assert (cut.action.reasoning, cut.action.text) == ("hm and", "")
    assert told(layer.said(closed)) == ("yes", "hm", [])
    assert told(layer.said(cut)) == ("", "hm and", [])
    shut = [*prompt, *layer.chat.render_text("</think>\n")]
    assert layer.opening(shut) == []


def test_a_stop_string_is_no_text_but_its_tokens_are_kept(lab):
    layer = make(lab.Scripted(("one END", "stop")))
    turn = answer(layer, layer.prompt(ASK), stop=("END",))
    assert told(layer.said(turn))[0] == "one "
    assert told(layer.said(turn, trim=False))[0] == "one END"
    assert layer.chat.decode(turn.result.tokens) == "one END"


def test_a_stream_that_is_left_aborts_the_request(lab):
    engine = lab.Scripted(("hello you", "stop"))
    layer = make(engine)

    async def main():
        pieces = layer.stream(asked(layer, layer.prompt(ASK)))
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(main())
    assert engine.left == ["r"]


def test_without_streams_an_answer_is_one_piece(lab):
    engine = lab.Scripted(("hello you", "stop"))
    layer = ChatLayer(make(engine).chat, Vocabulary(tiny.tokenizer()), engine.generate)
    (piece,) = streamed(layer, layer.prompt(ASK))
    assert (told(piece.said)[0], piece.answer.action.text) == ("hello you", "hello you")


def test_a_conversation_that_the_format_does_not_take(lab):
    layer = make(lab.Scripted(("x", "stop")), "{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match="refused a conversation of user"):
        layer.prompt(ASK)


def test_pieces_are_joined():
    pieces = [
        GenerateResult([1], [-1.0], "", [0]),
        GenerateResult([2], [-2.0], "", [1]),
        GenerateResult([], [], "stop", []),
    ]
    assert joined(pieces) == GenerateResult([1, 2], [-1.0, -2.0], "stop", [0, 1])
