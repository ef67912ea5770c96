"""An answer read in pieces: what is told is never taken back, and is the same however it was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_serve.reading import MarkupReader, Reading, Said, StopCut, Stretch, unfinished

from miles.api import HERMES, Action, ToolCall, parse_hermes

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
BROKEN = "<tool_call>\n{broken\n</tool_call>"
ALPHABET = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, BROKEN, "<", "</", "tool", "\n", " ", "x", "é"]


def read(text, sizes=(), stops=(), reasoning=False, offered=True):
    """Everything that is said of a text that comes in pieces of these sizes."""
    reading = Reading(HERMES, parse_hermes, stops, reasoning=reasoning, offered=offered)
    said = []
    for size in [*sizes, len(text)]:
        piece, text = text[:size], text[size:]
        said += reading.feed(piece)
    return said + reading.close(Action(""))


def joined(said, kind):
    return "".join(piece.text for piece in said if piece.kind == kind)


def calls(said):
    return [piece.call.name for piece in said if piece.call]


def test_text_reasoning_and_calls():
    said = read(f"<think>\nhm\n</think>\n\nlet me see\n{CALL}\n{CALL}")
    assert (joined(said, "reasoning"), joined(said, "text"), calls(said)) == ("hm", "let me see", ["add", "add"])
    assert [piece.kind for piece in said] == ["reasoning", "text", "tool_call", "tool_call"]


@pytest.mark.parametrize("text", ["hello", " hello\n", "a < b", "<thin", "a<tool_cal", "", "\n\n", "é <b>"])
def test_plain_text_stays_as_it_is(text):
    assert joined(read(text), "text") == text


def test_what_may_become_a_tag_waits():
    reading = Reading(HERMES, parse_hermes)
    assert reading.feed("a <tool") == [Said("text", "a")]
    assert reading.feed("box") == [Said("text", " <toolbox")]


@pytest.mark.parametrize("text", [BROKEN, "<tool_call>\n{", f"a {BROKEN} b", "<tool_call>a<tool_call>b</tool_call>"])
def test_a_malformed_call_is_text_as_the_model_wrote_it(text):
    said = read(text)
    assert (joined(said, "text"), calls(said)) == (text, [])


def test_a_call_beside_a_malformed_one():
    said = read(f"{BROKEN}{CALL}")
    assert (joined(said, "text"), calls(said)) == (BROKEN, ["add"])


def test_a_call_that_nobody_offered_is_text():
    said = read(f"so: {CALL}", offered=False)
    assert (joined(said, "text"), calls(said)) == (f"so: {CALL}", [])


def test_a_call_within_the_reasoning_is_reasoning():
    said = read(f"<think>{CALL}</think>yes")
    assert (joined(said, "reasoning"), joined(said, "text"), calls(said)) == (CALL, "yes", [])


def test_reasoning_that_the_prompt_opened():
    said = read("hm\n</think>\n\nyes", reasoning=True)
    assert (joined(said, "reasoning"), joined(said, "text")) == ("hm", "yes")
    assert joined(read("never ends", reasoning=True), "reasoning") == "never ends"


def test_a_stop_string_and_what_follows_are_left_out():
    assert joined(read("one\n\ntwo", stops=["\n\n"]), "text") == "one"
    assert joined(read("one END", stops=["ENDE", "D"]), "text") == "one EN"
    cut = StopCut(["END"])
    assert [cut.feed("one E"), cut.feed("N"), cut.feed("G"), cut.close()] == ["one ", "", "ENG", ""]
    assert cut.feed("EN") + cut.close() == "EN"


def test_a_call_that_ends_the_answer_by_a_stop_string_is_a_call():
    assert calls(read(CALL, stops=["</tool_call>"])) == ["add"]


def test_a_format_whose_markup_is_not_known_is_read_at_the_end():
    action = Action("text END more", "thoughts", (ToolCall("add", {}),))
    reading = Reading(None, parse_hermes, ["END"])
    assert reading.feed("[call]text END more") == []
    assert reading.close(action) == [
        Said("reasoning", "thoughts"),
        Said("text", "text "),
        Said("tool_call", call=ToolCall("add", {})),
    ]
    written = Reading(None, parse_hermes, offered=False)
    written.feed("[call]text")
    assert written.close(action) == [Said("text", "[call]text")]


def test_stretches_divide_the_text():
    reader = MarkupReader(HERMES)
    assert reader.feed("\n<think>\nhm\n</think>\n\na \n<tool_call>b</tool_call> c") == [
        Stretch("text", "\n"),
        Stretch("reasoning", "hm"),
        Stretch("text", "a \n"),
        Stretch("call", "<tool_call>b</tool_call>"),
        Stretch("text", " c"),
    ]
    assert reader.close() == []


@pytest.mark.parametrize(("text", "length"), [("ab</t", 3), ("ab<", 1), ("ab", 0), ("", 0)])
def test_the_unfinished_end_of_a_text(text, length):
    assert unfinished(["</think>", "<think>"], text) == length


pieces = st.lists(st.sampled_from(ALPHABET), max_size=8)
sizes = st.lists(st.integers(0, 9), max_size=12)


@given(pieces, sizes, st.booleans(), st.booleans())
def test_how_it_was_cut_makes_no_difference(pieces, sizes, reasoning, offered):
    text = "".join(pieces)
    told = [
        (joined(said, "text"), joined(said, "reasoning"), calls(said))
        for said in (
            read(text, cut, stops=["xx"], reasoning=reasoning, offered=offered) for cut in (sizes, [1] * len(text), [])
        )
    ]
    assert told[0] == told[1] == told[2]


@given(st.text("<>/thinkol_ \nx"), st.lists(st.sampled_from(["hm", "a\n", CALL]), max_size=3))
def test_it_reads_what_the_format_parses(reasoning, middle):
    """Where reasoning comes first and is closed, the pieces are those of the parsed action."""
    text = f"<think>{reasoning}</think>{''.join(middle)}"
    if "</think>" in reasoning:
        return
    action, said = parse_hermes(text), read(text)
    assert joined(said, "reasoning") == action.reasoning
    assert joined(said, "text").split() == action.text.split()
    assert calls(said) == [call.name for call in action.tool_calls]
