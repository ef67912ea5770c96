"""Chat formats that are wrong in one way each: the built-in one with a mistake."""

from dataclasses import replace

from miles.api import HERMES, ChatContext, DataError, Markup, ToolCall
from miles.builtins.chat_template import TemplateChat
from miles.testing import ChatFormatContract, tiny


def but(**members):
    wrong = type("Wrong", (TemplateChat,), members)
    return lambda: wrong(context=ChatContext(tiny.tokenizer()))


def answers_only_once(self, messages, tools=None):
    tokens, mask = TemplateChat.render_conversation(self, messages, tools)
    last = max(i for i in range(1, len(mask)) if mask[i] and not mask[i - 1])
    return tokens, [0] * last + mask[last:]


def everything(self, messages, tools=None):
    tokens, _ = TemplateChat.render_conversation(self, messages, tools)
    return tokens, [1] * len(tokens)


def without_end(self, messages, tools=None):
    tokens, mask = TemplateChat.render_conversation(self, messages, tools)
    return tokens, [m * (t != self.end_of_turn_id) for t, m in zip(tokens, mask, strict=True)]


def once_marked(self, messages, closed=True):
    """What a tool said must not be taken for what the assistant said."""
    if "miles-assistant-turn-marker" in str(messages):
        raise DataError("an assistant's turn is shown twice")
    return TemplateChat.render_next(self, messages, closed)


def parsed(change):
    return lambda self, tokens, reason="stop": change(TemplateChat.parse(self, tokens, reason))


def remembering(self, messages, tools=None):
    self.seen = getattr(self, "seen", 0) + 1
    return TemplateChat.render_prompt(self, messages, tools) * self.seen


def strict_parse(self, tokens, reason="stop"):
    action = TemplateChat.parse(self, tokens, reason)
    if any(call.error for call in action.tool_calls):
        raise ValueError("malformed call")
    return action


def raising_on_roles(self, messages, tools=None):
    known = {"user": 0, "assistant": 1, "system": 2, "tool": 3}
    assert all(known[message["role"]] >= 0 for message in messages)
    return TemplateChat.render_prompt(self, messages, tools)


def test_the_built_in_one_passes(passes):
    passes(ChatFormatContract, but(), takes_reasoning=True)


def test_wrong_ones_are_caught(catches):
    base = TemplateChat
    extra = lambda name: lambda self, *a, **k: [*getattr(base, name)(self, *a, **k), 5]  # noqa: E731
    counted = iter(range(100))
    catches(
        ChatFormatContract,
        {
            "test_prompts_are_the_templates": [
                but(render_prompt=extra("render_prompt")),
                but(render_prompt=lambda self, m, tools=None: base.render_prompt(self, list(m)[-1:], tools)),
            ],
            "test_text_is_taken_as_it_is": [
                but(render_text=extra("render_text")),
                but(render_text=lambda self, text: base.render_text(self, text.strip())),
            ],
            "test_turns_appended_to_the_stream_equal_the_whole_conversation": [
                but(render_next=lambda self, m, closed=True: base.render_next(self, m, closed)[1:]),
                but(render_next=lambda self, m, closed=True: base.render_prompt(self, m)),
            ],
            "test_a_conversation_of_any_kind_is_token_in_token_out": [
                but(parse=parsed(lambda action: replace(action, finish_reason="stop"))),
                but(render_next=once_marked),
            ],
            "test_a_conversation_in_good_form_is_the_templates": [
                but(render_next=lambda self, m, closed=True: base.render_next(self, m[:1], closed)),
                but(render_next=lambda self, m, closed=True: base.render_next(self, m, closed)[1:]),
                but(render_prompt=lambda self, m, tools=None: base.render_prompt(self, m)),
                but(parse=parsed(lambda action: replace(action, tool_calls=action.tool_calls[:1]))),
                but(parse=parsed(lambda action: replace(action, text=action.text.strip()))),
            ],
            "test_what_follows_does_not_depend_on_what_was_said": [
                but(render_next=lambda self, m, closed=True: [next(counted)]),
            ],
            "test_an_open_turn_is_closed_first": [
                but(render_next=lambda self, m, closed=True: base.render_next(self, m, True)),
                but(render_next=lambda self, m, closed=True: base.render_next(self, m, not closed)),
            ],
            "test_turns_end_at_a_token": [
                but(stop_token_ids=property(lambda self: (), lambda self, value: None)),
                but(render_conversation=without_end),
            ],
            "test_a_conversation_for_sft": [
                but(render_conversation=everything),
                but(render_conversation=answers_only_once),
            ],
            "test_special_tokens_are_not_text": [
                but(decode=lambda self, tokens: self.tokenizer.decode(list(tokens), skip_special_tokens=False)),
            ],
            "test_what_is_said_parses_back": [
                but(parse=parsed(lambda action: replace(action, text=action.text + "<|im_end|>"))),
                but(parse=parsed(lambda action: replace(action, finish_reason="stop"))),
            ],
            "test_tool_calls_parse_back": [
                but(parse=parsed(lambda action: replace(action, tool_calls=()))),
                but(render_prompt=lambda self, m, tools=None: base.render_prompt(self, m)),
                but(parse=parsed(lambda action: replace(action, tool_calls=(ToolCall("add", {"a": "1"}),)))),
            ],
            "test_whatever_the_model_says_can_be_parsed": [but(parse=strict_parse)],
            "test_reasoning_is_read_apart": [
                but(parse=parsed(lambda action: replace(action, text=action.reasoning + action.text, reasoning=""))),
            ],
            "test_its_markup_is_what_its_models_write": [
                but(markup=Markup(HERMES.reasoning, ("[call]", "[/call]"))),
                but(markup=Markup(("[think]", "[/think]"), HERMES.call)),
            ],
            "test_rendering_has_no_memory": [but(render_prompt=remembering)],
            "test_a_role_it_does_not_know_is_no_crash": [but(render_prompt=raising_on_roles)],
        },
        takes_reasoning=True,
    )
