"""The contract of chat formats: token in, token out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import pytest

from miles.config import Spec
from miles.contexts import ChatContext
from miles.errors import MilesError
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.testing.conversations import check_stream, play, tidy, wild
from miles.types import Action, Message

SYSTEM: Message = {"role": "system", "content": "be brief"}
USER: Message = {"role": "user", "content": "hello\n\n"}
ANSWER: Message = {"role": "assistant", "content": "hello you"}
TOOL: Message = {"role": "tool", "content": "3\n"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
    }
]
ARGUMENTS = {"a": 1, "b": ["ü", None]}
CALL: Message = {
    "role": "assistant",
    "content": "let me see",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}],
}


class ChatFormatContract(ComponentContract):
    """Conversations as tokens.

    Example:
        class TestTemplate(ChatFormatContract):
            name = "template"
    """

    kind = "chat_formats"
    takes_tools: ClassVar[bool] = True
    """It describes tools in a prompt and reads calls of them."""
    takes_reasoning: ClassVar[bool] = False
    """It reads reasoning apart from the answer."""
    follow_up: ClassVar[Message] = USER
    """What follows an answer in a conversation that the template renders whole. A family whose template takes back the
    thoughts before the last question says `chat.TOOL`: after a tool's answer they stay."""
    forgets: ClassVar[str] = ""
    """Pattern of what the family's template takes back of turns before the last question, such as their thoughts. The
    stream keeps it: the model has seen it."""
    conversations: ClassVar[int] = 40
    """How many made-up conversations of each sort are played."""

    def tokenizer(self) -> Any:
        """A tokenizer that the format is made for. By default a tiny byte-level one with a ChatML template and the
        usual tags; override it (`tiny.tokenizer(template)`) where the family's template says something else."""
        return tiny.tokenizer()

    def context(self) -> ChatContext:
        return ChatContext(self.tokenizer())

    def by_template(self, messages: Sequence[Message], tools: Any = None, speak: bool = False) -> list[int] | None:
        """The family's own rendering of a whole conversation, by the tokenizer's template; None without one."""
        tokenizer = self.tokenizer()
        if tokenizer.chat_template is None:
            return None
        text = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=speak)
        return tokenizer.encode(text, add_special_tokens=False)

    def said(self, chat: Any, message: Message) -> list[int]:
        """What the assistant itself produces for this message, its end token included."""
        tokens, mask = chat.render_conversation([USER, message])
        return [token for token, trained in zip(tokens, mask, strict=True) if trained]

    def call_ids(self, chat: Any) -> list[str]:
        """What the format calls three calls of one turn; nothing where it takes no tools."""
        if not self.takes_tools:
            return []
        calls = chat.parse(self.said(chat, {**CALL, "tool_calls": CALL["tool_calls"] * 3})).tool_calls
        assert len({call.id for call in calls}) == 3, f"three calls of one turn have the ids {[c.id for c in calls]}"
        return [call.id for call in calls]

    def test_prompts_are_the_templates(self) -> None:
        """The model was trained on its template; one line break less, and it answers worse."""
        chat = self.build()
        for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
            expected = self.by_template(messages, speak=True)
            if expected is not None:
                assert chat.render_prompt(messages) == expected

    def test_text_is_taken_as_it_is(self) -> None:
        """No special token, no blank is added to a prompt that is plain text."""
        chat, tokenizer = self.build(), self.tokenizer()
        for text in ("hello", " hello \n\n", "größe 🧮", ""):
            assert tokenizer.decode(chat.render_text(text)) == text
            assert chat.decode(chat.render_text(text)) == text

    def test_turns_appended_to_the_stream_equal_the_whole_conversation(self) -> None:
        """The promise of multi-turn training: what the model said is never tokenised again, and what follows it is
        what the template would have put there."""
        chat = self.build()
        said = CALL if self.follow_up["role"] == "tool" else ANSWER
        if self.takes_reasoning and said is CALL:
            said = {**CALL, "reasoning_content": "hm"}
        stream = [*chat.render_prompt([USER]), *self.said(chat, said), *chat.render_next([self.follow_up])]
        conversation = [USER, said, self.follow_up]
        assert stream == (self.by_template(conversation, speak=True) or chat.render_prompt(conversation))

    def test_a_conversation_of_any_kind_is_token_in_token_out(self) -> None:
        """Whatever model and environment say: the stream is the prompt, the model's own tokens and what `render_next`
        puts between, with the model's tokens alone trained, each with its log-probability and weight version."""
        chat, generate = self.build(), installed().build("generate_functions", Spec(name="multi_turn"))
        for seed in range(self.conversations):
            conversation = wild(Random(seed), chat, self.call_ids(chat))
            sample, told, partner = play(generate, chat, conversation, Random(seed))
            check_stream(chat, conversation, sample, told)
            assert [action.finish_reason for action in partner.heard] == [reason for _, reason in conversation.turns]

    def test_a_conversation_in_good_form_is_the_templates(self) -> None:
        """Several turns, parallel calls and their results in order, thoughts, text that is awkward: the stream is what
        the template makes of the sample's messages, to the token, but for what it `forgets`."""
        chat, generate = self.build(), installed().build("generate_functions", Spec(name="multi_turn"))
        for seed in range(self.conversations):
            random, end = Random(seed), chat.end_of_turn_id
            said = lambda message: self.said(chat, message)  # noqa: E731
            conversation = tidy(random, said, end, self.call_ids(chat), self.takes_reasoning)
            sample, told, partner = play(generate, chat, conversation, random)
            check_stream(chat, conversation, sample, told)
            calls = [[call.id for call in action.tool_calls] for action in partner.heard[:-1]]
            results = [[m["tool_call_id"] for m in answer if m["role"] == "tool"] for answer in conversation.answers]
            assert calls == results, "calls are lost, or their ids are not those of their places"
            before = max(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
            whole = self.by_template(sample.messages[:before], conversation.tools or None, speak=True)
            stream = sample.tokens[: sample.turns[-1].start]
            if whole is None:
                continue
            if self.forgets:
                whole, stream = (self._remembered(tokens) for tokens in (whole, stream))
            assert stream == whole

    def _remembered(self, tokens: Sequence[int]) -> list[int]:
        tokenizer = self.tokenizer()
        text = re.sub(self.forgets, "", tokenizer.decode(tokens, skip_special_tokens=False), flags=re.DOTALL)
        return tokenizer.encode(text, add_special_tokens=False)

    def test_what_follows_does_not_depend_on_what_was_said(self) -> None:
        """`render_next` gets no tokens of the turn before: it may only add to them."""
        chat = self.build()
        following = chat.render_next([USER])
        assert following
        assert following == self.build().render_next([USER])

    def test_an_open_turn_is_closed_first(self) -> None:
        """A turn that ended by a stop string has no end token; the next one would run into it."""
        chat = self.build()
        if chat.end_of_turn_id is None:
            pytest.skip("has no token at which a turn ends")
        assert chat.render_next([USER], closed=False) == [chat.end_of_turn_id, *chat.render_next([USER])]

    def test_turns_end_at_a_token(self) -> None:
        """Without a stop token every response runs to its length limit."""
        chat = self.build()
        assert chat.stop_token_ids, "no stop tokens"
        assert len(set(chat.stop_token_ids)) == len(chat.stop_token_ids)
        if chat.end_of_turn_id is not None:
            assert chat.end_of_turn_id in chat.stop_token_ids
            assert self.said(chat, ANSWER)[-1] == chat.end_of_turn_id, "SFT does not teach where a turn ends"

    def test_a_conversation_for_sft(self) -> None:
        """The whole conversation, and a mask on what the assistant says, its end tokens included, and nothing else."""
        chat = self.build()
        tokens, mask = chat.render_conversation([USER, ANSWER, USER, ANSWER])
        assert len(tokens) == len(mask)
        assert set(mask) == {0, 1}
        spans = _spans(tokens, mask)
        assert len(spans) == 2, f"{len(spans)} stretches are trained, of 2 answers"
        assert all("hello you" in chat.decode(span) for span in spans)
        unspoken = chat.decode([token for token, trained in zip(tokens, mask, strict=True) if not trained])
        assert "hello you" not in unspoken
        assert tokens[: mask.index(1)] == chat.render_prompt([USER]), "SFT and rollouts see different prompts"

    def test_special_tokens_are_not_text(self) -> None:
        """Rewards compare the decoded text with a label."""
        chat = self.build()
        assert chat.decode([*chat.render_text("hello you"), *chat.stop_token_ids[:1]]) == "hello you"

    def test_what_is_said_parses_back(self) -> None:
        """Environments see the text without its end token, and why it ended."""
        chat = self.build()
        for tokens in (self.said(chat, ANSWER), chat.render_text("hello you")):
            action = chat.parse(tokens)
            assert isinstance(action, Action)
            assert (action.text.strip(), action.tool_calls) == ("hello you", ())
        assert chat.parse(chat.render_text("hello y"), "length").finish_reason == "length"
        assert chat.parse([], "abort").text == ""

    def test_tool_calls_parse_back(self) -> None:
        """A call reaches the environment with its name and its arguments, and its answer reaches the model."""
        if not self.takes_tools:
            pytest.skip("takes no tools")
        chat = self.build()
        described = chat.render_prompt([USER], TOOLS)
        assert "add" in chat.decode(described), "the prompt does not describe the tool"
        assert described != chat.render_prompt([USER])
        (call,) = chat.parse(self.said(chat, CALL)).tool_calls
        assert (call.name, call.arguments, call.error) == ("add", ARGUMENTS, None)
        assert "3" in chat.decode(chat.render_next([{**TOOL, "tool_call_id": call.id}]))

    def test_whatever_the_model_says_can_be_parsed(self) -> None:
        """Broken calls, tags without an end, halves of characters: a call with an `error`, or text, no exception."""
        chat = self.build()
        texts = [
            "<tool_call>\n{broken\n</tool_call>", "<tool_call>", "</tool_call>", "<think>", "</think></think>",
            '<tool_call>{"name": 3, "arguments": "x"}</tool_call>', "<tool_call>[]</tool_call>", "\x00",
        ]  # fmt: skip
        streams = [chat.render_text(text) for text in texts] + [chat.render_text("é")[:1], list(chat.stop_token_ids)]
        for tokens in streams:
            for reason in ("stop", "length", "abort"):
                action = chat.parse(tokens, reason)
                for call in action.tool_calls:
                    assert isinstance(call.arguments, dict)
                    assert isinstance(call.name, str)
        for text in texts[:1] if self.takes_tools else ():
            calls = chat.parse(chat.render_text(text)).tool_calls
            assert all(call.error for call in calls), "a call that is no JSON has no error"

    def test_reasoning_is_read_apart(self) -> None:
        """Environments and rewards look at the answer, not at the thoughts before it."""
        if not self.takes_reasoning:
            pytest.skip("does not tell reasoning from the answer")
        chat = self.build()
        action = chat.parse(chat.render_text("<think>\nhm\n</think>\n\nyes"))
        assert (action.text, action.reasoning) == ("yes", "hm")

    def test_its_markup_is_what_its_models_write(self) -> None:
        """A server passes text on until it sees a tag: a tag that it does not know is shown to the client."""
        chat = self.build()
        markup = getattr(chat, "markup", None)
        if markup is None:
            pytest.skip("does not say its markup: its answers are passed on when they are finished")
        if self.takes_tools:
            written = self.tokenizer().decode(self.said(chat, CALL), skip_special_tokens=False)
            assert written.count(markup.call[0]) == written.count(markup.call[1]) == 1
        if self.takes_reasoning:
            action = chat.parse(chat.render_text("hm".join(markup.reasoning) + "yes"))
            assert (action.text, action.reasoning) == ("yes", "hm")

    def test_rendering_has_no_memory(self) -> None:
        """One object renders for hundreds of trajectories."""
        chat = self.build()
        first = chat.render_prompt([USER], TOOLS if self.takes_tools else None)
        messages = [dict(USER), dict(ANSWER), dict(USER)]
        chat.render_prompt(messages)
        assert messages == [USER, ANSWER, USER], "the messages were changed"
        assert chat.render_prompt([USER], TOOLS if self.takes_tools else None) == first

    def test_a_role_it_does_not_know_is_no_crash(self) -> None:
        """It is rendered, or refused with an error that names the trouble."""
        try:
            tokens = self.build().render_prompt([{"role": "auditor", "content": "?"}])
        except MilesError:
            return
        assert tokens


def _spans(tokens: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    """Stretches of tokens whose mask is 1."""
    spans: list[list[int]] = []
    before = 0
    for token, trained in zip(tokens, mask, strict=True):
        if trained and not before:
            spans.append([])
        if trained:
            spans[-1].append(token)
        before = trained
    return spans
