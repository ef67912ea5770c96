"""How families write tool calls: notations that the chat format by template can read.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>                       Qwen and most others
    llama     {"name": ..., "parameters": {...}}, the whole turn or after <|python_tag|>     Llama 3.1 and later
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}], [TOOL_CALLS]name[ARGS]{...}   Mistral

Each reads a decoded turn, special tokens of the notation kept, and never raises: a malformed call carries its error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from miles.api import Action, ToolCall, malformed_call, parse_hermes, read_call, split_reasoning

PYTHON_TAG, TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"
_BEGINS_A_CALL = re.compile(r'\{\s*"name"\s*:')


def notation_of(template: Any) -> str:
    """The notation that a tokenizer's chat template uses."""
    text = str(template)
    if "<tool_call>" in text:
        return "hermes"
    if TOOL_CALLS in text:
        return "mistral"
    return "llama" if PYTHON_TAG in text or ("<|start_header_id|>" in text and "parameters" in text) else "hermes"


def parse_llama(text: str, finish_reason: str = "stop") -> Action:
    """One call, or several with semicolons between. JSON that is no call, and not marked as one, is an answer."""
    reasoning, said = split_reasoning(text)
    before, tag, body = said.partition(PYTHON_TAG) if PYTHON_TAG in said else ("", "", said)
    calls: list[ToolCall] = []
    body = body.strip()
    while body:
        call_id = f"call_{len(calls)}"
        try:
            value, end = json.JSONDecoder().raw_decode(body)
        except (ValueError, RecursionError) as error:
            if not tag and not calls and not _BEGINS_A_CALL.match(body):
                break
            calls.append(malformed_call(f"the call is not JSON: {error}", body, call_id))
            break
        if not tag and not calls and not (isinstance(value, dict) and {"name", "parameters"} <= value.keys()):
            break
        calls.append(read_call(value, body[:end], call_id, "parameters"))
        body = body[end:].lstrip("; \n")
    return Action(before.strip() if calls else said, reasoning, tuple(calls), finish_reason)


def parse_mistral(text: str, finish_reason: str = "stop") -> Action:
    """A list of calls, or calls one by one. Ids are the model's own, or of nine letters and digits, as its templates
    want them."""
    reasoning, said = split_reasoning(text)
    before, *bodies = said.split(TOOL_CALLS)
    calls: list[ToolCall] = []
    for body in bodies:
        head, one_by_one, arguments = body.partition("[ARGS]")
        name, _, own_id = head.partition("[CALL_ID]")
        try:
            values = [{"name": name.strip(), "arguments": arguments, "id": own_id}] if one_by_one else json.loads(body)
        except (ValueError, RecursionError) as error:
            calls.append(malformed_call(f"the calls are not JSON: {error}", body, _mistral_id(len(calls))))
            continue
        for value in values if isinstance(values, list) else [values]:
            given = value.get("id") if isinstance(value, dict) else None
            call_id = given if isinstance(given, str) and given else _mistral_id(len(calls))
            calls.append(read_call(value, body, call_id))
    return Action(before.strip() if calls else said, reasoning, tuple(calls), finish_reason)


def _mistral_id(index: int) -> str:
    return f"call{index:05d}"


NOTATIONS: dict[str, Callable[[str, str], Action]] = {
    "hermes": parse_hermes,
    "llama": parse_llama,
    "mistral": parse_mistral,
}
