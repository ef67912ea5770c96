"""What a model says, read while it says it: reasoning, text and tool calls, in pieces that are never taken back.

Three things are held back until it is clear what they are: the bytes of a character that is not whole, the start of
what may become a stop string, and the start of what may become a tag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from miles.api import Action, Markup, ToolCall


@dataclass(frozen=True)
class Said:
    """A piece of an answer."""

    kind: Literal["text", "reasoning", "tool_call"]
    text: str = ""
    call: ToolCall | None = None
    """Of a `tool_call`, whole and well-formed."""


@dataclass(frozen=True)
class Stretch:
    """A piece of text as the markup divides it."""

    kind: Literal["text", "reasoning", "call"]
    text: str
    """Of a `call`, its tags and what stands between them."""


class StopCut:
    """Text up to the first of some strings, which is not part of it."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.reached = False
        self._held = ""

    def feed(self, text: str) -> str:
        if self.reached:
            return ""
        self._held += text
        found = first_of(self.stops, self._held)
        if found is not None:
            self.reached = True
            return self._held[: found[0]]
        certain = len(self._held) - unfinished(self.stops, self._held)
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def close(self) -> str:
        """What was held back and turned out to be no stop string."""
        out, self._held = "" if self.reached else self._held, ""
        return out


class MarkupReader:
    """Divides text at the tags of a chat format. Line breaks around reasoning belong to its tags.

    Reasoning comes first or not at all; tags of calls within it are part of it.
    """

    def __init__(self, markup: Markup, reasoning: bool = False):
        """`reasoning`: the prompt has opened it already."""
        self.markup = markup
        self._mode: Literal["text", "reasoning", "call"] = "reasoning" if reasoning else "text"
        self._reasoned = False
        """Reasoning is over."""
        self._fresh = reasoning
        """At the start of reasoning, or of the text after it."""
        self._held = self._breaks = self._call = ""

    def feed(self, text: str) -> list[Stretch]:
        self._held += text
        stretches: list[Stretch] = []
        while (found := first_of(self._tags, self._held)) is not None:
            at, tag = found
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            stretches += self._take(before)
            stretches += self._turn(tag)
        certain = len(self._held) - unfinished(self._tags, self._held)
        before, self._held = self._held[:certain], self._held[certain:]
        return stretches + self._take(before)

    def close(self) -> list[Stretch]:
        """The rest, once nothing follows any more."""
        stretches, self._held = self._take(self._held), ""
        return [*stretches, Stretch("call", self._call)] if self._mode == "call" else stretches

    @property
    def _tags(self) -> tuple[str, ...]:
        """Those that mean something here."""
        opening, closing = self.markup.call
        if self._mode == "call":
            return closing, opening
        if self._mode == "reasoning":
            return (self.markup.reasoning[1],)
        return (opening,) if self._reasoned else (opening, *self.markup.reasoning)

    def _take(self, text: str) -> list[Stretch]:
        """Text of the mode. Line breaks at the end of reasoning wait for more of it."""
        if self._mode == "call":
            self._call += text
            return []
        text = self._breaks + text
        if self._fresh:
            text = text.lstrip("\n")
        told = text.rstrip("\n") if self._mode == "reasoning" else text
        self._breaks = text[len(told) :]
        self._fresh = self._fresh and not told
        return [Stretch(self._mode, told)] if told else []

    def _turn(self, tag: str) -> list[Stretch]:
        """What a tag ends; and the mode that it begins."""
        opens_call, closes_call = self.markup.call
        if self._mode == "call":
            call = Stretch("call", self._call + (tag if tag == closes_call else ""))
            self._mode, self._call = ("text", "") if tag == closes_call else ("call", tag)
            return [call]
        if tag == opens_call:
            self._mode, self._call = "call", tag
        else:
            self._mode = "reasoning" if tag == self.markup.reasoning[0] else "text"
            self._reasoned = self._mode == "text"
            self._breaks, self._fresh = "", True
        return []


class Reading:
    """One answer, fed with text and closed with its end; hands out what is certain.

    A call that cannot be parsed, or that nobody asked for, is text, as the model wrote it. White space at the end of
    the text is told once there is more, or when it ends and there was no call: what stands around calls is no text.
    """

    def __init__(
        self,
        markup: Markup | None,
        parse: Callable[[str], Action],
        stops: Sequence[str] = (),
        *,
        reasoning: bool = False,
        offered: bool = True,
    ):
        """
        Args:
            markup: the format's tags; None where they are not known, and everything is handed out at the end.
            parse: reads the text of a call, as the format does.
            stops: strings at which the text ends.
            reasoning: the prompt has opened the reasoning.
            offered: whether there are tools to call.
        """
        self.parse, self.offered = parse, offered
        self._cut = StopCut(stops)
        self._reader = MarkupReader(markup, reasoning) if markup else None
        self._calls, self._called = 0, False
        self._text = self._space = ""

    def feed(self, text: str) -> list[Said]:
        text = self._cut.feed(text)
        if self._reader is None:
            self._text += text
            return []
        return self._say(self._reader.feed(text))

    def close(self, action: Action) -> list[Said]:
        """The rest. `action`: what the format makes of the whole, which counts where its markup is not known."""
        if self._reader is None:
            return self._whole(action, self._text + self._cut.close())
        said = self._say([*self._reader.feed(self._cut.close()), *self._reader.close()])
        return said if self._called or not self._space else [*said, Said("text", self._space)]

    def _say(self, stretches: Sequence[Stretch]) -> list[Said]:
        said = [self._call(s.text) if s.kind == "call" else self._told(s.kind, s.text) for s in stretches]
        return [piece for piece in said if piece.text or piece.call]

    def _told(self, kind: Literal["text", "reasoning"], text: str) -> Said:
        if kind == "reasoning":
            self._space = ""
            return Said("reasoning", text)
        text = self._space + text
        told = text.rstrip()
        self._space = text[len(told) :]
        return Said("text", told)

    def _call(self, text: str) -> Said:
        index, self._calls = self._calls, self._calls + 1
        call = self._parsed(text) if self.offered else None
        if call is None:
            return self._told("text", text)
        self._called = True
        return Said("tool_call", call=replace(call, id=f"call_{index}"))

    def _parsed(self, text: str) -> ToolCall | None:
        """The call, if it is well-formed. One that a stop string has cut short of its closing tag is."""
        closing = self._reader.markup.call[1] if self._reader and self._cut.reached else ""
        for written in (text, text + closing):
            calls = self.parse(written).tool_calls
            if calls and not calls[0].error:
                return calls[0]
        return None

    def _whole(self, action: Action, text: str) -> list[Said]:
        """An answer whose markup is not known: as its format parsed it, or as it was written, if a call of it is not to
        be told from text."""
        if action.tool_calls and (not self.offered or any(call.error for call in action.tool_calls)):
            return [Said("text", text)]
        parts = [Said("reasoning", action.reasoning), Said("text", up_to(self._cut.stops, action.text))]
        return [part for part in parts if part.text] + [Said("tool_call", call=call) for call in action.tool_calls]


def up_to(stops: Sequence[str], text: str) -> str:
    """Text before the first of these strings."""
    found = first_of(stops, text)
    return text if found is None else text[: found[0]]


def first_of(strings: Sequence[str], text: str) -> tuple[int, str] | None:
    """Where the first of these strings begins, and which it is."""
    found = [(at, string) for string in strings if (at := text.find(string)) >= 0]
    return min(found) if found else None


def unfinished(strings: Sequence[str], text: str) -> int:
    """Length of the longest end of the text with which one of these strings may begin."""
    longest = max((len(string) for string in strings), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if _begins(strings, text[-n:])), 0)


def _begins(strings: Sequence[str], start: str) -> bool:
    return any(string.startswith(start) for string in strings)
