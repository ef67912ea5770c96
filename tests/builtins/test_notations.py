"""Tool calls as Llama and Mistral write them; and which notation a template uses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.api import ChatContext
from miles.builtins.chat_template import TemplateChat
from miles.builtins.notations import NOTATIONS, notation_of, parse_llama, parse_mistral
from miles.builtins.options import TemplateOptions
from miles.testing import tiny


def read(action):
    return action.text, [(call.name, call.arguments, call.error) for call in action.tool_calls]


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1}, None)]),
        ('\n {"name": "add", "parameters": "{\\"a\\": 1}"}\n', "", [("add", {"a": 1}, None)]),
        (
            '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"c": "};"}}',
            "", [("a", {}, None), ("b", {"c": "};"}, None)],
        ),
        ('I look. <|python_tag|>{"name": "a", "parameters": {}}', "I look.", [("a", {}, None)]),
        ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ("{so", "{so", []),
        ("plain", "plain", []),
        ("", "", []),
        ("[1]", "[1]", []),
    ],
)  # fmt: skip
def test_llama(said, text, calls):
    assert read(parse_llama(said)) == (text, calls)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('{"name": "a", "parameters": {"b"', "the call is not JSON"),
        ('{"name": "a", "parameters": [1]}', "the parameters are not an object"),
        ('{"name": 3, "parameters": {}}', 'not an object {"name": ..., "parameters": {...}}'),
        ("<|python_tag|>print(1)", "the call is not JSON"),
        ('{"name": "a", "parameters": {}} and then', "the call is not JSON"),
    ],
)
def test_llamas_mistakes(said, why):
    *_, last = parse_llama(said).tool_calls
    assert why in last.error
    assert "raw" in last.arguments


@pytest.mark.parametrize(
    ("said", "text", "calls", "ids"),
    [
        (
            '[TOOL_CALLS] [{"name": "a", "arguments": {"b": 1}, "id": "xyz456789"}, {"name": "c", "arguments": {}}]',
            "", [("a", {"b": 1}, None), ("c", {}, None)], ["xyz456789", "call00001"],
        ),
        (
            'Well. [TOOL_CALLS]a[ARGS]{"b": 1}[TOOL_CALLS]c[CALL_ID]xyz456789[ARGS]{}',
            "Well.", [("a", {"b": 1}, None), ("c", {}, None)], ["call00000", "xyz456789"],
        ),
        (" plain ", " plain ", [], []),
    ],
)  # fmt: skip
def test_mistral(said, text, calls, ids):
    action = parse_mistral(said)
    assert read(action) == (text, calls)
    assert [call.id for call in action.tool_calls] == ids


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("[TOOL_CALLS] [{", "not JSON"),
        ("[TOOL_CALLS] [3]", "not an object"),
        ("[TOOL_CALLS]a[ARGS]{", "the arguments are text but not JSON"),
        ("[TOOL_CALLS]", "not JSON"),
    ],
)
def test_mistrals_mistakes(said, why):
    [call] = parse_mistral(said).tool_calls
    assert why in call.error
    assert len(call.id) == 9


@given(
    st.sampled_from(sorted(NOTATIONS)),
    st.lists(
        st.sampled_from(
            ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '{"name": "a"}', "[", "]", "{", "}", "<think>",
             "x", '{"name": "a", "parameters": 1}', ";", "\n", "</think>", '{"name": "a", "arguments": {}}'],
        )
    ),
)  # fmt: skip
def test_nothing_raises(notation, pieces):
    action = NOTATIONS[notation]("".join(pieces), "length")
    assert all(call.error or call.name for call in action.tool_calls)
    assert action.finish_reason == "length"


@pytest.mark.parametrize(
    ("template", "notation"),
    [
        (None, "hermes"),
        (tiny.CHATML, "hermes"),
        ("{{ '<|start_header_id|>' }} <tool_call>", "hermes"),
        ("{{ '<|start_header_id|>' }}", "hermes"),
        ('{{ \'<|start_header_id|>\' }}{"name": ..., "parameters": ...}', "llama"),
        ("{{ '<|python_tag|>' }}", "llama"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
    ],
)
def test_the_template_says_which(template, notation):
    assert notation_of(template) == notation
    chat = TemplateChat(context=ChatContext(tiny.tokenizer(template)))
    assert (chat.calls, chat.markup is None) == (notation, notation != "hermes")


def test_an_option_says_otherwise():
    chat = TemplateChat(TemplateOptions("llama"), context=ChatContext(tiny.tokenizer()))
    [call] = chat.parse(chat.render_text('{"name": "add", "parameters": {}}<|im_end|>')).tool_calls
    assert (call.name, call.error) == ("add", None)
