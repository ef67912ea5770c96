"""A session's conversations as token streams: where a request goes on from, and what grows there.

Clients send a conversation anew with every request. What the model said in it is recognised by what the client was
told, and is never tokenised again: the request goes on from the tokens of the deepest of the model's turns that the
conversation begins with. One that goes on from the end of a branch makes the branch longer. One that goes on from the
middle (an edited history, a retry, a summary, two requests at once) begins another branch, whose beginning is a copy
that is not trained: every token that the model produced is trained on in the branch that it was produced for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from miles.api import Message, Sample, begin_again

_encode = json.JSONEncoder(sort_keys=True).encode


@dataclass(eq=False)
class Branch:
    """One conversation from its first message to its last: a sample that grows by turns."""

    sample: Sample
    busy: bool = False
    """The model is speaking in it."""
    full: bool = False
    """What came after its last turn did not fit into the context."""
    spoke: float = 0.0
    """When its last turn ended."""
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """The end of one of the model's turns."""

    branch: Branch
    end: int
    """Tokens up to there."""
    state: bytes
    """Digest of the conversation up to there."""


@dataclass(frozen=True)
class Place:
    """Where a request goes on from."""

    mark: Mark | None
    """None for a conversation in which the model has not spoken."""
    rest: Sequence[Message]
    """What came after it: all of the conversation without one."""
    state: bytes
    """Digest of the whole conversation."""


class Tree:
    """All branches of a session."""

    def __init__(self, sample: Sample):
        """`sample`: fresh; branches are made in its image."""
        self.sample = sample
        self.branches: list[Branch] = []
        """Those in which the model has spoken, in the order of their first turns."""
        self._marks: dict[bytes, Mark] = {}

    def find(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Place:
        """The deepest of the model's turns that a conversation begins with."""
        state, found, after = digest(b"", list(tools or [])), None, 0
        for i, message in enumerate(messages):
            state = digest(state, as_compared(message))
            if message["role"] == "assistant" and (mark := self._marks.get(state)):
                found, after = mark, i + 1
        return Place(found, messages[after:], state)

    def branch(self, place: Place) -> Branch:
        """What grows at a place: the branch that ends there, or a new one."""
        mark = place.mark
        if mark is None:
            return Branch(self.sample.beginning(self.sample.prompt_length))
        if mark.end == len(mark.branch.sample.tokens) and not mark.branch.busy:
            return mark.branch
        sibling = mark.branch.sample.beginning(mark.end)
        sibling.loss_mask[:] = 0
        return Branch(sibling)

    def say(self, branch: Branch, following: Sequence[int]) -> None:
        """Add what came before the model speaks: to an empty branch, its prompt."""
        if branch.sample.turns:
            branch.sample.append(following)
        else:
            begin_again(branch.sample, following)

    def heard(self, branch: Branch, place: Place, messages: Sequence[Message], reply: Message, end: int) -> None:
        """The client has been told what the model said in the turn that ended at token `end`."""
        state = digest(place.state, as_compared(reply))
        self._marks[state] = Mark(branch, end, state)
        if end == len(branch.sample.tokens):
            branch.messages = [*messages, reply]


def as_compared(message: Message) -> dict[str, Any]:
    """What of a message tells whether two are the same.

    Clients rarely send reasoning back, some strip white space, some give calls ids of their own: that is no other
    turn of the model.
    """
    told: dict[str, Any] = dict(message)
    if message["role"] == "assistant":
        told.pop("reasoning_content", None)
        told["content"] = (message.get("content") or "").strip()
        told["tool_calls"] = [call["function"] for call in message.get("tool_calls") or []]
    return told


def digest(state: bytes, told: Any) -> bytes:
    """Of a conversation that goes on from `state` with this."""
    return blake2b(state + _encode(told).encode(), digest_size=16).digest()
