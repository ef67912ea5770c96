"""The notation that most chat templates share for what an assistant says besides text.

    <think>reasoning</think>
    <tool_call>
    {"name": "search", "arguments": {"query": "miles"}}
    </tool_call>

It comes from the Hermes models; Qwen and many others use it. Chat formats build on `parse_hermes`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from miles.types import Action, ToolCall


@dataclass(frozen=True)
class Markup:
    """Tags, opening and closing, between which the models of a chat format write what is not text. They tell a server
    what of an unfinished answer is certain."""

    reasoning: tuple[str, str]
    call: tuple[str, str]
    """Of a tool call."""


HERMES = Markup(("<think>", "</think>"), ("<tool_call>", "</tool_call>"))

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


def parse_hermes(text: str, finish_reason: str = "stop") -> Action:
    """What an assistant's turn says: text, reasoning, tool calls. Never raises; a malformed call carries its error.

    Args:
        text: the decoded turn, special tokens of the notation kept, end-of-turn tokens removed.
        finish_reason: goes into the action as it is.
    """
    reasoning, text = split_reasoning(text)
    calls = tuple(_tool_call(i, *match.group(1, 2)) for i, match in enumerate(_CALL.finditer(text)))
    return Action(_CALL.sub("", text).strip() if calls else text, reasoning, calls, finish_reason)


def split_reasoning(text: str) -> tuple[str, str]:
    """`(reasoning, rest)`. The opening tag may stand in the prompt; without a closing one all of it is reasoning."""
    head, closed, rest = text.partition("</think>")
    if closed:
        return head.split("<think>")[-1].strip("\n"), rest.lstrip("\n")
    before, opened, inside = text.partition("<think>")
    return (inside.strip("\n"), "") if opened and not before.strip() else ("", text)


def _tool_call(index: int, body: str, closing: str) -> ToolCall:
    call_id = f"call_{index}"
    if not closing:
        return malformed_call("the call is not closed with </tool_call>", body, call_id)
    try:
        call: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        return malformed_call(f"the call is not JSON: {error}", body, call_id)
    return read_call(call, body, call_id)


def malformed_call(why: str, body: str, call_id: str, name: str = "") -> ToolCall:
    return ToolCall(name, {"raw": body.strip()}, call_id, error=why)


def read_call(call: Any, body: str, call_id: str, key: str = "arguments") -> ToolCall:
    """A call from its JSON, `{"name": ..., "arguments": {...}}`, or what is wrong with it.

    Args:
        body: the text of it, for a call that is malformed.
        key: what the notation calls arguments.
    """
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return malformed_call(f'the call is not an object {{"name": ..., "{key}": {{...}}}}', body, call_id)
    arguments = call.get(key, {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return malformed_call(f"the {key} are text but not JSON: {error}", body, call_id, call["name"])
    if not isinstance(arguments, dict):
        return malformed_call(f"the {key} are not an object", body, call_id, call["name"])
    return ToolCall(call["name"], arguments, call_id)
