"""Chat format `template`: whatever the tokenizer's own chat template says.

A template renders whole conversations; a rollout needs only what follows the tokens that exist. So `render_next` lets
the template render a conversation in which the assistant has said a marker, and takes what comes after the marker.
The first token of that must be the one that ends an assistant's turn: a special token, at which tokenisation
starts afresh, so the tokens are the same as in the whole conversation. A template that does not work this way is
refused with an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from miles.api import HERMES, Action, ChatContext, DataError, Markup, Message
from miles.builtins.notations import NOTATIONS, notation_of
from miles.builtins.options import TemplateOptions

MARKER = "miles-assistant-turn-marker"
BY_TEMPLATE = TemplateOptions()
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateChat:
    """Renders by `tokenizer.apply_chat_template`. A tokenizer without a template serves prompts that are text."""

    def __init__(self, options: TemplateOptions = BY_TEMPLATE, *, context: ChatContext):
        self.tokenizer = context.tokenizer
        self.calls = notation_of(self.tokenizer.chat_template) if options.calls == "auto" else options.calls
        self.template_kwargs = dict(context.template_kwargs)
        ends = [self.end_of_turn_id, self.tokenizer.eos_token_id, *context.eos_token_ids]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(token for token in ends if token is not None))

    @cached_property
    def markup(self) -> Markup | None:
        """See `ChatFormat`; None in a notation without tags at both ends of a call."""
        return HERMES if self.calls == "hermes" else None

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The special token that the template puts after what the assistant said, if there is one."""
        if self.tokenizer.chat_template is None:
            return None
        try:
            tokens = self._encode(self._after_marker([], speak=False))
        except DataError:
            return None
        return tokens[0] if tokens and self._is_special(tokens[0]) else None

    def _is_special(self, token: int) -> bool:
        return token in self.tokenizer.all_special_ids or token in self.tokenizer.added_tokens_decoder

    # ------------------------------------------------------------------------------------------------------ rendering

    def render_text(self, text: str) -> list[int]:
        return self._encode(text)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        return self._encode(self._render(messages, tools, speak=True))

    def render_next(self, messages: Sequence[Message], closed: bool = True) -> list[int]:
        """See `ChatFormat`. Raises DataError when the template does not end turns with a special token."""
        following = self._after_marker(messages, speak=True)
        if not following.startswith(self._turn_tail):
            raise DataError(
                f"the chat template ends an assistant's turn with {self._turn_tail!r} when it is the last one and "
                f"with {following[:40]!r} when {', '.join(m['role'] for m in messages)} follows. {_OTHER_FORMAT}"
            )
        tokens = self._encode(following)
        return tokens[1:] if closed else tokens

    def render_conversation(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`. The template's own `{% generation %}` marks say what the assistant said; without them,
        the conversation is put together turn by turn, as a rollout would, each turn with its end token."""
        if _GENERATION.search(str(self.tokenizer.chat_template)):
            rendered = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(rendered["input_ids"]), [int(m) for m in rendered["assistant_masks"]]
        tokens: list[int] = []
        mask: list[int] = []
        asked = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise DataError("the conversation starts with the assistant: there is nothing to answer")
            given = self.render_next(messages[asked:turn]) if asked else self.render_prompt(messages[:turn], tools)
            said = self._said(messages[: turn + 1], tools)
            tokens += given + said
            mask += [0] * len(given) + [1] * len(said)
            asked = turn + 1
        return tokens, mask

    def _said(self, messages: Sequence[Message], tools: Sequence[dict] | None) -> list[int]:
        """Tokens of the last message, the assistant's, its end token included."""
        before = self._render(messages[:-1], tools, speak=True)
        whole = self._render(messages, tools, speak=False)
        if not whole.startswith(before):
            raise DataError(f"the chat template changes earlier text once the assistant has spoken. {_OTHER_FORMAT}")
        return [*self._encode(whole[len(before) :].removesuffix(self._turn_tail)), self._required_turn_end]

    @cached_property
    def _turn_tail(self) -> str:
        """All that the template puts after what the assistant said in its last turn."""
        _ = self._required_turn_end
        return self._after_marker([], speak=False)

    @property
    def _required_turn_end(self) -> int:
        if self.end_of_turn_id is None:
            raise DataError(
                "the tokenizer's chat template does not end an assistant's turn with a special token, so turns cannot "
                f"be told apart in a token stream. {_OTHER_FORMAT}"
                if self.tokenizer.chat_template is not None
                else _NO_TEMPLATE
            )
        return self.end_of_turn_id

    def _after_marker(self, messages: Sequence[Message], speak: bool) -> str:
        """What the template puts after an assistant's turn that these messages follow."""
        marker = MARKER
        while marker in str(messages):
            marker += "!"
        asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        rendered = self._render([*asked, *messages], None, speak)
        if rendered.count(marker) != 1:
            raise DataError(
                f"the chat template shows an assistant's turn {rendered.count(marker)} times. {_OTHER_FORMAT}"
            )
        return rendered.partition(marker)[2]

    def _render(self, messages: Sequence[Message], tools: Sequence[dict] | None, speak: bool) -> str:
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=speak)

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict] | None, **how: Any) -> Any:
        if self.tokenizer.chat_template is None:
            raise DataError(_NO_TEMPLATE)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, **how, **self.template_kwargs
            )
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refused a conversation of {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    # -------------------------------------------------------------------------------------------------------- reading

    def parse(self, tokens: Sequence[int], finish_reason: str = "stop") -> Action:
        """Reasoning as in `miles.hermes`, tool calls in the notation of the template (`miles.builtins.notations`)."""
        said = list(tokens)
        while said and said[-1] in self.stop_token_ids:
            said.pop()
        return NOTATIONS[self.calls](self._decode(said, skip_special_tokens=False), finish_reason)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._decode(list(tokens), skip_special_tokens=True)

    def _decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


_OTHER_FORMAT = "Name a chat format made for this model family with data.chat_format (--chat-format)"
_NO_TEMPLATE = (
    "the tokenizer has no chat template, so it cannot render messages: use prompts that are text, or name a chat "
    "format with data.chat_format (--chat-format)"
)
