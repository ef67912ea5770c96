"""Qwen3's format against a Jinja template of the same format, on a byte-level tokenizer built here."""

from pathlib import Path

import pytest
from miles_qwen.chat import NO_THOUGHTS, Qwen3Chat
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.api import ChatContext, ConfigError, DataError
from miles.testing import ChatFormatContract

TEMPLATE = (Path(__file__).parent / "qwen3.jinja").read_text(encoding="utf-8").strip()
HYBRID = TEMPLATE.replace("EMPTY_THOUGHTS", "true").replace(
    "OPENING", r"{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
THINKING = TEMPLATE.replace("EMPTY_THOUGHTS", "true").replace("OPENING", r"{{ '<think>\n' }}")
INSTRUCT = TEMPLATE.replace("EMPTY_THOUGHTS", "false").replace("OPENING", "")

TOOLS = [{"type": "function", "function": {"name": "größe", "description": 'say "hi" <b>', "parameters": {"x": 1}}}] * 2
SYSTEM = {"role": "system", "content": "be brief"}
ASK = {"role": "user", "content": "how?\n"}
CALLS = {
    "role": "assistant",
    "content": "I look.",
    "reasoning_content": "two calls",
    "tool_calls": [
        {"type": "function", "function": {"name": "a", "arguments": {"q": "ü"}}},
        {"type": "function", "function": {"name": "b", "arguments": '{"n": 1}'}},
    ],
}
BARE_CALL = {**CALLS, "content": "", "tool_calls": CALLS["tool_calls"][:1]}
TOOL = {"role": "tool", "content": "42"}
ANSWER = {"role": "assistant", "content": "done", "reasoning_content": "so"}


def make_tokenizer(template, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("l", "e"), ("l", "o")]
    pieces = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    tokenizer.add_tokens([AddedToken(name, special=False) for name in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1])
    fast.chat_template = template
    return fast


def chat_of(template=HYBRID, **kwargs):
    return Qwen3Chat(context=ChatContext(make_tokenizer(template), kwargs))


def by_template(chat, messages, tools=None, speak=True, **kwargs):
    text = chat.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=speak, **kwargs
    )
    return chat.tokenizer.encode(text, add_special_tokens=False)


CONVERSATIONS = {
    "question": [ASK],
    "system": [SYSTEM, ASK],
    "no messages but a system": [SYSTEM],
    "tools answered": [ASK, CALLS, TOOL, TOOL],
    "calls without text": [ASK, BARE_CALL, TOOL],
    "thoughts of an earlier question are dropped": [ASK, ANSWER, ASK],
    "thoughts of this question are kept": [ASK, ANSWER, ASK, CALLS, TOOL],
    "thoughts in the content": [ASK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, TOOL],
    "a late system message": [ASK, ANSWER, SYSTEM],
    "a tool's answer as a user": [ASK, CALLS, {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [HYBRID, THINKING, INSTRUCT], ids=["hybrid", "thinking", "instruct"])
def test_prompts_are_the_templates(template, messages, tools):
    chat = chat_of(template)
    assert chat.tokenizer.decode(chat.render_prompt(messages, tools)) == chat.tokenizer.decode(
        by_template(chat, messages, tools)
    )
    assert chat.render_prompt(messages, tools) == by_template(chat, messages, tools)


def test_without_thinking_the_thoughts_are_closed_at_once():
    chat = chat_of(enable_thinking=False)
    assert chat.render_prompt([ASK]) == by_template(chat, [ASK], enable_thinking=False)
    assert chat.tokenizer.decode(chat.render_prompt([ASK])).endswith(NO_THOUGHTS)


@pytest.mark.parametrize("template", [HYBRID, None], ids=["by template", "no template"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_a_stream_grown_turn_by_turn_equals_the_whole_rendering(template, tools):
    chat, reference = chat_of(template), chat_of()
    conversation = [SYSTEM, ASK, CALLS, TOOL, TOOL, BARE_CALL, TOOL, ANSWER]
    end = chat.stop_token_ids[0]
    stream = chat.render_prompt(conversation[:2], tools)
    for said, follows in ((2, conversation[3:5]), (5, conversation[6:7]), (7, None)):
        before = by_template(reference, conversation[:said], tools)
        whole = by_template(reference, conversation[: said + 1], tools, speak=False)
        stream += whole[len(before) : -2]  # what the model says: all but its end token and the line break
        assert whole[-2] == end
        if follows is not None:
            stream += chat.render_next(follows, closed=False)
    assert [*stream, *whole[-2:]] == by_template(reference, conversation, tools, speak=False)


def test_an_open_turn_is_closed_first():
    chat = chat_of()
    assert chat.end_of_turn_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.render_next([TOOL], closed=False) == [chat.end_of_turn_id, *chat.render_next([TOOL], closed=True)]


@pytest.mark.parametrize("template", [HYBRID, THINKING, INSTRUCT], ids=["hybrid", "thinking", "instruct"])
def test_a_conversation_for_sft(template):
    chat = chat_of(template)
    messages = [ASK, CALLS, TOOL, ANSWER]
    tokens, mask = chat.render_conversation(messages, TOOLS)
    assert [*tokens, *chat.render_text("\n")] == by_template(chat, messages, TOOLS, speak=False)
    trained = chat.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    opened = "" if template is THINKING else "<think>\n"
    assert trained.startswith(f"{opened}two calls\n</think>\n\nI look.\n<tool_call>")
    assert trained.endswith(f"<|im_end|>{opened}so\n</think>\n\ndone<|im_end|>")


def test_sft_without_thinking_trains_the_answer_alone():
    chat = chat_of(enable_thinking=False)
    tokens, mask = chat.render_conversation([ASK, {"role": "assistant", "content": "yes"}])
    assert chat.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m]) == "yes<|im_end|>"
    assert NO_THOUGHTS in chat.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if not m])


def test_what_is_said_parses_back():
    chat = chat_of()
    tokens, mask = chat.render_conversation([ASK, CALLS])
    action = chat.parse([t for t, m in zip(tokens, mask, strict=True) if m])
    assert (action.text, action.reasoning) == ("I look.", "two calls")
    assert [(c.name, c.arguments) for c in action.tool_calls] == [("a", {"q": "ü"}), ("b", {"n": 1})]


def test_a_malformed_call_is_a_call_with_an_error():
    chat = chat_of()
    [call] = chat.parse(chat.render_text("<tool_call>\n{broken\n</tool_call><|im_end|>")).tool_calls
    assert "not JSON" in call.error
    assert call.arguments == {"raw": "{broken"}


def test_turns_end_with_either_end_token():
    chat = Qwen3Chat(context=ChatContext(make_tokenizer(HYBRID), eos_token_ids=(5,)))
    assert chat.stop_token_ids == (*chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), 5)
    assert chat.decode([*chat.render_text("hi"), *chat.stop_token_ids[:2]]) == "hi"


def test_a_tokenizer_without_the_formats_tokens_still_serves_text():
    chat = Qwen3Chat(context=ChatContext(make_tokenizer(None, special=("<eos>",))))
    assert chat.render_text("hi")
    assert chat.stop_token_ids == (chat.tokenizer.eos_token_id,)
    with pytest.raises(ConfigError, match=r"no token <\|im_start\|> and <\|im_end\|>"):
        chat.render_prompt([ASK])


def test_another_familys_template_is_refused():
    with pytest.raises(ConfigError, match="--chat-format template"):
        chat_of("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}").render_prompt([ASK])
    other_tools = HYBRID.replace("# Tools", "# Functions")
    assert chat_of(other_tools).render_prompt([ASK])
    with pytest.raises(ConfigError, match="describes tools in another way"):
        chat_of(other_tools).render_prompt([ASK], TOOLS)


def test_unknown_options_roles_and_contents_are_refused():
    with pytest.raises(ConfigError, match="enable_thinking, not thinking"):
        chat_of(thinking=True)
    with pytest.raises(DataError, match="not 'developer'"):
        chat_of().render_prompt([{"role": "developer", "content": "x"}])
    with pytest.raises(DataError, match="holds list"):
        chat_of().render_prompt([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize("name", ["qwen3", "template"])
@pytest.mark.parametrize("template", [HYBRID, THINKING, INSTRUCT], ids=["hybrid", "thinking", "instruct"])
def test_conversations_of_all_members_by_the_familys_format_and_by_the_template(name, template):
    """Turn by turn the stream is what the template says of the whole, but for thoughts that it takes back."""
    wanted = name

    class TestMember(ChatFormatContract):
        name = wanted
        takes_reasoning = True
        forgets = r"<think>\n.*?\n</think>\n\n"

        def tokenizer(self):
            return make_tokenizer(template)

    TestMember().test_a_conversation_of_any_kind_is_token_in_token_out()
    TestMember().test_a_conversation_in_good_form_is_the_templates()
