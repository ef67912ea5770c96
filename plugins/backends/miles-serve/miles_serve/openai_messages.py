"""Messages: as clients send them, as chat formats take them, and what was said as clients are told it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from miles.api import Message
from miles_serve.openai_types import ChatMessage, Part
from miles_serve.reading import Said


def as_message(given: ChatMessage) -> Message:
    """For a chat format. Parts become one text; the arguments of calls become objects, as templates write them."""
    message: Message = {
        "role": "system" if given.role == "developer" else given.role,
        "content": _text(given.content),
    }
    if given.reasoning_content:
        message["reasoning_content"] = given.reasoning_content
    if given.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in given.tool_calls
        ]
    if given.tool_call_id:
        message["tool_call_id"] = given.tool_call_id
    if given.name:
        message["name"] = given.name
    return message


def _text(content: str | list[Part] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _arguments(given: str | dict[str, Any]) -> Any:
    """An object; what is no JSON object stays as it is."""
    if isinstance(given, dict):
        return given
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return given
    return arguments if isinstance(arguments, dict) else given


class MessageWriter:
    """What was said in one choice, as OpenAI's fields. Its calls have ids that no other turn of a conversation has."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.calls = 0

    def delta(self, said: Said) -> dict[str, Any]:
        """One piece of a stream."""
        if said.kind == "reasoning":
            return {"reasoning_content": said.text}
        if said.call is None:
            return {"content": said.text}
        index, self.calls = self.calls, self.calls + 1
        function = {"name": said.call.name, "arguments": json.dumps(said.call.arguments, ensure_ascii=False)}
        call = {"index": index, "id": f"call_{self.id}_{index}", "type": "function", "function": function}
        return {"tool_calls": [call]}

    def message(self, said: Sequence[Said]) -> dict[str, Any]:
        """The whole of it."""
        text = "".join(piece.text for piece in said if piece.kind == "text")
        reasoning = "".join(piece.text for piece in said if piece.kind == "reasoning")
        calls = [call for piece in said if piece.call for call in self.delta(piece)["tool_calls"]]
        for call in calls:
            del call["index"]
        return {
            "role": "assistant",
            "content": text if text or not (calls or reasoning) else None,
            "reasoning_content": reasoning or None,
            "tool_calls": calls or None,
        }

    def finish_reason(self, reason: str) -> str:
        """`tool_calls` where the turn ended by itself and made some."""
        return "tool_calls" if self.calls and reason == "stop" else reason
