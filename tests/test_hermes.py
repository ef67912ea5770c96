"""The Hermes notation: reasoning and tool calls, whole, malformed and cut off."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.hermes import parse_hermes, split_reasoning


@pytest.mark.parametrize(
    ("said", "reasoning", "rest"),
    [
        ("plain", "", "plain"),
        ("<think>\nhm\n</think>\n\nanswer", "hm", "answer"),
        ("hm\n</think>\n\nanswer", "hm", "answer"),  # the prompt opened the tag
        ("<think>\n\n</think>\n\nanswer", "", "answer"),
        ("<think>\ncut", "cut", ""),
        ("text <think> in passing", "", "text <think> in passing"),
    ],
)
def test_reasoning(said, reasoning, rest):
    assert split_reasoning(said) == (reasoning, rest)


def call(body):
    return f"<tool_call>\n{body}\n</tool_call>"


def test_parallel_calls_and_the_text_around_them():
    said = "I look.\n" + call('{"name": "a", "arguments": {"x": 1}}') + "\n" + call('{"name": "b", "arguments": "{}"}')
    action = parse_hermes(said)
    assert action.text == "I look."
    assert [(c.name, c.arguments, c.id, c.error) for c in action.tool_calls] == [
        ("a", {"x": 1}, "call_0", None),
        ("b", {}, "call_1", None),
    ]


@pytest.mark.parametrize(
    ("body", "why", "name"),
    [
        ("{nonsense", "not JSON", ""),
        ('["a"]', "not an object", ""),
        ('{"arguments": {}}', "not an object", ""),
        ('{"name": "a", "arguments": [1]}', "arguments are not an object", "a"),
        ('{"name": "a", "arguments": "x"}', "arguments are text but not JSON", "a"),
    ],
)
def test_a_malformed_call_carries_its_error_and_its_text(body, why, name):
    [bad] = parse_hermes(call(body)).tool_calls
    assert why in bad.error
    assert (bad.name, bad.arguments) == (name, {"raw": body})


def test_an_unclosed_call_does_not_swallow_the_next():
    said = '<tool_call>{"name": "a"}<tool_call>{"name": "b"}</tool_call>'
    first, second = parse_hermes(said).tool_calls
    assert "not closed" in first.error
    assert (second.name, second.error) == ("b", None)


def test_calls_within_reasoning_are_not_calls():
    action = parse_hermes("<think>" + call('{"name": "a"}') + "</think>done")
    assert (action.tool_calls, action.text) == ((), "done")


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "a"}', "[", "x", "\n"]))
)
def test_nothing_raises(pieces):
    action = parse_hermes("".join(pieces), "length")
    assert all(c.error or c.name for c in action.tool_calls)
