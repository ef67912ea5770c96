"""Chat format `qwen3`: ChatML with thinking and tool calls.

    <|im_start|>system
    ...<|im_end|>
    <|im_start|>user
    ...<|im_end|>
    <|im_start|>assistant
    <think>
    ...
    </think>

    ...<|im_end|>

Tools are described in the system turn; the assistant calls them in `<tool_call>` tags; what they answer comes as a user
turn of `<tool_response>` tags. In a prompt, reasoning is shown only after the last question, as Qwen's template does;
in a token stream, nothing that was said is ever taken away.

The family has members whose templates differ in two points: what is put into the assistant's mouth when it shall speak
(`<think>` for those that always think), and whether a turn without reasoning shows empty thoughts. The tokenizer's
template, when it has one, says which; one that is not of this format at all is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from miles.api import HERMES, Action, ChatContext, ConfigError, DataError, Message, parse_hermes, split_reasoning

END, SPEAK = "<|im_end|>", "<|im_start|>assistant\n"
NO_THOUGHTS = "<think>\n\n</think>\n\n"
TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
PROBE: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
PROBE_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
PROBE_ANSWER: Message = {"role": "assistant", "content": "a"}


@dataclass(frozen=True)
class Variant:
    """Where members of the family differ."""

    opening: str
    """What follows `<|im_start|>assistant` in the prompt."""
    shows_empty_thoughts: bool
    """A turn without reasoning is written with empty thoughts."""


class Qwen3Chat:
    """Qwen3's conversations as tokens. The template option `enable_thinking: false` closes the thoughts at once."""

    markup = HERMES

    def __init__(self, *, context: ChatContext):
        self.tokenizer = context.tokenizer
        unknown = sorted(set(context.template_kwargs) - {"enable_thinking"})
        if unknown:
            raise ConfigError(
                f"data.chat_template_kwargs: chat format qwen3 knows enable_thinking, not {', '.join(unknown)}; use "
                "data.chat_format=template for other options of the tokenizer's template"
            )
        self._kwargs = dict(context.template_kwargs)
        vocabulary = self.tokenizer.get_vocab()
        self.end_of_turn_id: int | None = vocabulary.get(END)
        ends = [self.end_of_turn_id, vocabulary.get("<|endoftext|>"), self.tokenizer.eos_token_id]
        ids = (token for token in (*ends, *context.eos_token_ids) if token is not None)
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))

    @cached_property
    def variant(self) -> Variant:
        """Raises ConfigError when the tokenizer's template, or its vocabulary, is not of this format."""
        missing = [token for token in ("<|im_start|>", END) if token not in self.tokenizer.get_vocab()]
        if missing:
            raise ConfigError(f"chat format qwen3: the tokenizer has no token {' and '.join(missing)}. {_OTHER}")
        if self.tokenizer.chat_template is None:
            return Variant(NO_THOUGHTS if self._kwargs.get("enable_thinking") is False else "", True)
        before = _turn("system", "s") + _turn("user", "u") + SPEAK
        asked = self._by_template(PROBE, add_generation_prompt=True)
        answered = self._by_template([*PROBE, PROBE_ANSWER])
        said = answered.removeprefix(before)
        if not asked.startswith(before) or said not in (f"a{END}\n", f"{NO_THOUGHTS}a{END}\n"):
            raise ConfigError(
                f"chat format qwen3: the tokenizer's template renders {asked!r}, not {before!r}. {_OTHER}"
            )
        return Variant(asked.removeprefix(before), said.startswith(NO_THOUGHTS))

    @cached_property
    def _calls_tools_this_way(self) -> bool:
        if self.tokenizer.chat_template is None:
            return True
        return self._by_template(PROBE, tools=PROBE_TOOLS) == _system(PROBE, PROBE_TOOLS) + _turn("user", "u")

    def _by_template(self, messages: Sequence[Message], **how: Any) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **how, **self._kwargs)

    # ------------------------------------------------------------------------------------------------------ rendering

    def render_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        opening = SPEAK + self.variant.opening
        if tools and not self._calls_tools_this_way:
            raise ConfigError(f"chat format qwen3: the tokenizer's template describes tools in another way. {_OTHER}")
        return self.render_text(_system(messages, tools) + self._turns(messages) + opening)

    def render_next(self, messages: Sequence[Message], closed: bool = True) -> list[int]:
        opening = SPEAK + self.variant.opening
        tokens = self.render_text(f"{END}\n{self._turns(messages, first=False)}{opening}")
        return tokens[1:] if closed else tokens

    def render_conversation(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """A conversation as a rollout would have produced it: every turn keeps its reasoning, and ends with its end
        token; the mask is 1 on what the assistant says, not on thoughts that are put into its mouth."""
        tokens: list[int] = []
        mask: list[int] = []
        asked = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self.render_next(messages[asked:i]) if tokens else self.render_prompt(messages[:i], tools)
            said = self.render_text(self._said(message) + END)
            tokens += given + said
            mask += [0] * len(given) + [1] * len(said)
            asked = i + 1
        return tokens, mask

    def _turns(self, messages: Sequence[Message], first: bool = True) -> str:
        """Turns of a prompt; the first system turn is written with the tools, before."""
        question = max((i for i, message in enumerate(messages) if _is_question(message)), default=len(messages))
        text = ""
        for i, message in enumerate(messages):
            role, content = message["role"], _text(message)
            if role == "tool":
                text += "" if i and messages[i - 1]["role"] == "tool" else "<|im_start|>user"
                text += f"\n<tool_response>\n{content}\n</tool_response>"
                text += "" if i + 1 < len(messages) and messages[i + 1]["role"] == "tool" else f"{END}\n"
            elif role == "assistant":
                text += _turn(role, self._shown(message, i > question, i == len(messages) - 1))
            elif role == "user" or (role == "system" and (i or not first)):
                text += _turn(role, content)
            elif role != "system":
                raise DataError(f"chat format qwen3 knows the roles system, user, assistant and tool, not {role!r}")
        return text

    def _shown(self, message: Message, after_question: bool, last: bool) -> str:
        """An assistant's turn within a prompt: thoughts only after the last question."""
        reasoning, content = _reasoning(message)
        thoughts = ""
        if after_question and (reasoning or (last and self.variant.shows_empty_thoughts)):
            thoughts, content = f"<think>\n{reasoning}\n</think>\n\n", content.lstrip("\n")
        return thoughts + _with_calls(content, message)

    def _said(self, message: Message) -> str:
        """What the assistant itself produces for this turn, after what is put into its mouth."""
        reasoning, content = _reasoning(message)
        thoughts = f"<think>\n{reasoning}\n</think>\n\n" if reasoning or self.variant.shows_empty_thoughts else ""
        opening = self.variant.opening
        if opening == NO_THOUGHTS:
            thoughts = ""
        return thoughts.removeprefix(opening) + _with_calls(content.lstrip("\n") if thoughts else content, message)

    # -------------------------------------------------------------------------------------------------------- reading

    def parse(self, tokens: Sequence[int], finish_reason: str = "stop") -> Action:
        said = list(tokens)
        while said and said[-1] in self.stop_token_ids:
            said.pop()
        return parse_hermes(self._decode(said, skip_special_tokens=False), finish_reason)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._decode(list(tokens), skip_special_tokens=True)

    def _decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{END}\n"


def _system(messages: Sequence[Message], tools: Sequence[dict] | None) -> str:
    given = _text(messages[0]) if messages and messages[0]["role"] == "system" else None
    if not tools:
        return "" if given is None else _turn("system", given)
    listed = "".join("\n" + _json(tool) for tool in tools)
    return _turn("system", ("" if given is None else given + "\n\n") + TOOLS_BEFORE + listed + TOOLS_AFTER)


def _is_question(message: Message) -> bool:
    content = _text(message)
    answers_a_tool = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not answers_a_tool


def _text(message: Message) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise DataError(f"chat format qwen3 renders text; a {message['role']!r} message holds {type(content).__name__}")
    return content


def _reasoning(message: Message) -> tuple[str, str]:
    content, given = _text(message), message.get("reasoning_content")
    if isinstance(given, str):
        return given.strip("\n"), content
    return split_reasoning(content) if "</think>" in content else ("", content)


def _with_calls(content: str, message: Message) -> str:
    text = content
    for call in message.get("tool_calls") or []:
        function: Mapping[str, Any] = call.get("function") or call
        arguments = function.get("arguments", {})
        encoded = arguments if isinstance(arguments, str) else _json(arguments)
        text += "\n" if text else ""
        text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {encoded}}}\n</tool_call>'
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_OTHER = "Use data.chat_format=template (--chat-format template) for the tokenizer's own"
