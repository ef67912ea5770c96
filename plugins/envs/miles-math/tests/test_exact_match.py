"""Exact match: what is compared, how, and that nothing a model says makes it raise."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_math.answers import last_boxed, last_number
from miles_math.exact_match import ExactMatch
from miles_math.plugin import ExactMatchOptions

from miles.api import ConfigError, DataError, Prompt, Sample


def score(text, label, **options):
    sample = Sample.begin(Prompt("a:0", "a", text="?", label=label, tokens=[1]), id=0, group_id=0)
    sample.text = text
    return asyncio.run(ExactMatch(ExactMatchOptions(**options)).score(sample))


@pytest.mark.parametrize(
    ("text", "label", "options", "expected"),
    [
        ("42", 42, {}, 1),
        ("  42\n", "42", {}, 1),
        (" 42", "42", {"strip": False}, 0),
        ("a  b", "a b", {}, 1),
        ("Paris", "paris", {}, 0),
        ("Paris", "paris", {"casefold": True}, 1),
        ("<think>41</think>\n42", "42", {}, 1),
        ("42", ["41", "42"], {}, 1),
        ("", "42", {}, 0),
        (r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}", {"extract": "boxed"}, 1),
        ("no box", "no box", {"extract": "boxed"}, 0),
        ("thus\n 7 \n\n", "7", {"extract": "last_line"}, 1),
        ("first 3, then 1,234.", "1234", {"extract": "last_number"}, 1),
        ("Answer: 3. Answer: 4.", "4", {"pattern": r"Answer: (\d+)"}, 1),
        ("3 4", "4", {"pattern": r"\d+"}, 1),
        ("none", "4", {"pattern": r"Answer: (\d+)"}, 0),
    ],
)
def test_what_matches(text, label, options, expected):
    assert score(text, label, **options) == expected


def test_an_optional_group_that_did_not_take_part_is_no_answer():
    assert score("b", "a", pattern="(a)|b") == 0


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{a}", "a"),
        (r"\boxed {x_{1}}", "x_{1}"),
        (r"\fbox{a}", "a"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed 5", None),
        ("", None),
    ],
)
def test_the_last_box(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", "-3"),
        ("x=+1.5e3!", "+1.5e3"),
        (".5", ".5"),
        ("12,345,678", "12345678"),
        ("1.", "1"),
        ("v2 a.b", "2"),
        ("", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@given(
    st.text()
    | st.lists(st.sampled_from(["\\boxed{", "}", "{", "\\", "</think>", "1", ",", ".", "e", "-"])).map("".join),
    st.sampled_from(["whole", "boxed", "last_line", "last_number"]),
)
def test_nothing_raises(text, extract):
    assert score(text, "1", extract=extract) in (0.0, 1.0)


def test_a_prompt_without_a_label_is_an_error():
    with pytest.raises(DataError, match="a:0 has no label .*--label-key"):
        score("42", None)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="no regular expression"):
        ExactMatchOptions(pattern="(")
