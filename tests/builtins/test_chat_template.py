"""The format by template: what it appends equals what the template renders for the whole conversation."""

import pytest

from miles.api import DataError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "hello\n\n"}
CALL = {
    "role": "assistant",
    "content": "\nlet me see",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOL = {"role": "tool", "content": "3\n"}
ANSWER = {"role": "assistant", "content": "hello 3"}
TWO_TURNS = [USER, CALL, TOOL, ANSWER]

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def whole(chat, messages, tools=None, speak=False):
    return chat.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=speak, tokenize=False, **chat.template_kwargs
    )


def test_the_prompt_is_the_templates(chat):
    tokens = chat.render_prompt([USER], TOOLS)
    assert chat.tokenizer.decode(tokens) == whole(chat, [USER], TOOLS, speak=True)


def test_text_is_taken_as_it_is(chat):
    assert chat.tokenizer.decode(chat.render_text("hello")) == "hello"
    assert len(chat.render_text("hello")) == 1


def test_turns_appended_to_the_stream_equal_the_whole_rendering(chat):
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stream = chat.render_prompt([USER], TOOLS)
    said = whole(chat, [USER, CALL], TOOLS).removeprefix(whole(chat, [USER], TOOLS, speak=True))
    stream += [*chat.render_text(said.removesuffix("<|im_end|>\n")), end]
    stream += chat.render_next([TOOL, TOOL])
    assert chat.tokenizer.decode(stream) == whole(chat, [USER, CALL, TOOL, TOOL], TOOLS, speak=True)


def test_an_open_turn_is_closed_first(chat):
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.render_next([USER], closed=False) == [end, *chat.render_next([USER], closed=True)]


def test_turns_end_where_the_template_the_tokenizer_and_the_generation_config_say(chat_with):
    chat = chat_with(eos_token_ids=(7, 9))
    assert chat.stop_token_ids == (*chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), 7, 9)


def test_template_kwargs_reach_the_template(chat_with):
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ '!' if thinking else '?' }}"
    chat = chat_with(template, template_kwargs={"thinking": True})
    assert chat.tokenizer.decode(chat.render_prompt([USER])) == "hello\n\n<|im_end|>!"


@pytest.mark.parametrize("template", [None, GENERATION], ids=["turn by turn", "the template's own marks"])
def test_a_conversation_for_sft_masks_what_the_assistant_said(chat_with, template):
    chat = chat_with(template) if template else chat_with()
    messages = [USER, {"role": "assistant", "content": "one"}, USER, ANSWER]
    tokens, mask = chat.render_conversation(messages)
    trained = chat.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert trained == "one<|im_end|>hello 3<|im_end|>"
    assert chat.tokenizer.decode(tokens).rstrip("\n") == whole(chat, messages).rstrip("\n")


def test_a_conversation_with_tools_for_sft(chat):
    tokens, mask = chat.render_conversation(TWO_TURNS, TOOLS)
    assert chat.tokenizer.decode(tokens) + "\n" == whole(chat, TWO_TURNS, TOOLS)
    trained = chat.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert trained.startswith("\nlet me see<tool_call>\n")
    assert trained.endswith("</tool_call><|im_end|>hello 3<|im_end|>")


def test_parsing_a_turn(chat):
    end = chat.stop_token_ids[0]
    said = '<think>\nhm\n</think>\n\nlook\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    action = chat.parse([*chat.render_text(said), end])
    assert (action.text, action.reasoning, action.finish_reason) == ("look", "hm", "stop")
    assert [(c.name, c.arguments, c.error) for c in action.tool_calls] == [("add", {"a": 1}, None)]
    assert chat.parse(chat.render_text("cut o"), "length").finish_reason == "length"


def test_decoding_leaves_out_special_tokens(chat):
    assert chat.decode([*chat.render_text("hello . you"), chat.stop_token_ids[0]]) == "hello . you"


def test_without_a_template_text_still_works_and_messages_are_refused(chat_with):
    chat = chat_with(None)
    assert chat.render_text("hello")
    assert chat.stop_token_ids == (chat.tokenizer.eos_token_id,)
    assert chat.end_of_turn_id is None
    for render in (lambda: chat.render_prompt([USER]), lambda: chat.render_next([USER])):
        with pytest.raises(DataError, match="no chat template"):
            render()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "special token"),
        ("{{ messages[-1].content }}<|im_end|>", "0 times"),
        (
            "{% for m in messages %}{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endfor %}",
            "ends an assistant's turn with '<|endoftext|>' when it is the last",
        ),
    ],
    ids=["no end token", "drops turns", "ends turns in two ways"],
)
def test_a_template_that_cannot_be_continued_is_refused(chat_with, template, why):
    with pytest.raises(DataError, match=why.replace("|", r"\|")):
        chat_with(template).render_next([USER])


def test_a_template_that_rewrites_what_was_asked_is_refused_for_sft(chat_with):
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="changes earlier text"):
        chat_with(template).render_conversation([USER, ANSWER])


def test_what_the_template_refuses_is_a_data_error(chat_with):
    with pytest.raises(DataError, match="system first"):
        chat_with("{{ raise_exception('system first') }}").render_prompt([USER])
