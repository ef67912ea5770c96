"""The notation of search-r1: what a model writes, and how it is shown what was found.

    <think>I need to look this up.</think><search>inn Amber Falcon</search>

    <information>Doc 1(Title: Amber Falcon) The inn Amber Falcon is in Dunmore.</information>

    <think>It says so.</think><answer>Dunmore</answer>

A query or an answer ends the model's turn; what is found stands behind it in the same turn of the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from miles.api import Action

STOP = ("</search>", "</answer>")
TAG = re.compile(r"</?(?:think|search|information|answer)>")
FOLLOWING = {
    "": ("<think>",),
    "<think>": ("</think>",),
    "</think>": ("<search>", "<answer>"),
    "<search>": ("</search>",),
    "</search>": ("<information>",),
    "<information>": ("</information>",),
    "</information>": ("<think>",),
    "<answer>": ("</answer>",),
    "</answer>": (),
}
"""Tag -> tags that may come next in a valid conversation. Text stands only after an opening tag."""
_MOVE = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_MARKUP = re.compile(r"<(?=/?(?:think|search|information|answer)>|\|)")


@dataclass(frozen=True)
class Move:
    """What the model did in a turn."""

    kind: Literal["search", "answer"]
    text: str


@dataclass(frozen=True)
class Document:
    """A passage that was found."""

    title: str
    text: str


def read_move(action: Action) -> Move | None:
    """The first query or answer of a turn; None where there is neither.

    One within thoughts that the model did not close counts, too: its turn ended there.
    """
    found = _MOVE.search(action.text) or _MOVE.search(action.reasoning)
    if found is None:
        return None
    return Move("search" if found[1] == "search" else "answer", found[2].strip())


def document_of(row: Mapping[str, Any]) -> Document:
    """A passage from `{"title": ..., "text": ...}`, or from `{"contents": ...}`, whose first line is the title.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(row.get("text"), str):
        return Document(str(row.get("title") or ""), row["text"].strip())
    if not isinstance(row.get("contents"), str):
        raise ValueError(f"a passage has `contents`, or `title` and `text`; this one has {', '.join(row) or 'nothing'}")
    title, _, text = row["contents"].strip().partition("\n")
    return Document(title.strip().strip('"'), text.strip()) if text else Document("", title)


def information(documents: Sequence[Document], longest: int) -> str:
    """What the model is shown of a search.

    Tags that a passage spells lose their `<`, so that no passage ends the information, or answers the question.

    Args:
        longest: characters of all passages together.
    """
    lines = (f"Doc {i}(Title: {d.title}) {d.text}\n" for i, d in enumerate(documents, 1))
    found = plain("".join(lines).strip()) or "Nothing was found."
    return f"\n\n<information>{found[:longest]}</information>\n\n"


def plain(text: str) -> str:
    """The same without anything that this notation, or a chat template's `<|...|>`, would take for markup."""
    return _MARKUP.sub("", text).encode("utf-8", "replace").decode("utf-8")


def is_valid(text: str, opened: bool = False) -> bool:
    """Whether a conversation, from the model's first word on, is thoughts and searches in turns, and then an answer.

    Args:
        opened: the prompt ended with <think>.
    """
    state, place = "<think>" if opened else "", 0
    for found in TAG.finditer(text):
        if not _may_have(state, text[place : found.start()]) or found[0] not in FOLLOWING[state]:
            return False
        state, place = found[0], found.end()
    return state == "</answer>" and not text[place:].strip()


def _may_have(state: str, between: str) -> bool:
    inside = bool(state) and not state.startswith("</")
    return inside or not between.strip()
