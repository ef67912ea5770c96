"""Mathematical equality, in threads and out of time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_math.plugin import MathOptions
from miles_math.pool import WorkerPool
from miles_math.verify import MathReward

from miles.api import ConfigError, DataError, Prompt, Sample


def score(text, label, **options):
    sample = Sample.begin(Prompt("a:0", "a", text="?", label=label, tokens=[1]), id=0, group_id=0)
    sample.text = text
    return MathReward(MathOptions(**options)).score(sample)


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        (r"Thus \boxed{\frac{1}{2}}.", "0.5", 1),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
        (r"\boxed{(1,2)}", "(2,1)", 0),
        ("The final answer is $2\\sqrt{3}$.", r"\sqrt{12}", 1),
        ("It is 1,234 apples.", 1234, 1),
        ("7 + 5 = 12", "12", 1),
        ("13", "12", 0),
        (r"\boxed{12}", "3 * 4 = 12\n#### 12", 1),
        (r"\boxed{12}", r"so \boxed{12}", 1),
        (r"\boxed{4}", ["3", "4.0"], 1),
        (r"\boxed{50\%}", "0.5", 1),
        ("<think>\\boxed{1}</think> \\boxed{2}", "1", 0),
        ("I do not know", "1", 0),
        ("", "1", 0),
        (r"\boxed{\frac{1}{}", "1", 0),
    ],
)
def test_equality(text, label, expected):
    assert score(text, label)["reward"] == expected


def test_answers_outside_of_a_box_count_only_if_allowed():
    assert score("12", "12", require_boxed=True) == {"reward": 0.0, "answered": 0.0}
    assert score(r"\boxed{12}", "12", require_boxed=True) == {"reward": 1.0, "answered": 1.0}


def test_whether_there_was_an_answer_is_reported():
    assert score("no idea at all", "1")["answered"] == 0.0
    assert score(r"\boxed{2}", "1") == {"reward": 0.0, "answered": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("answer", [r"\boxed{10^{10^{10^{10}}}}", r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}"])
def test_what_takes_for_ever_is_worth_nothing_and_the_next_answer_is_judged(answer, caplog):
    started = time.monotonic()
    assert score(answer, "1", timeout=1.0)["reward"] == 0.0
    assert time.monotonic() - started < 20
    assert score(r"\boxed{0.25}", r"\frac14")["reward"] == 1.0


def test_a_worker_that_was_killed_is_replaced():
    pool = WorkerPool(1)
    assert pool.compare(["1"], r"\boxed{1.0}", 20)["correct"]
    worker = pool._free.get()
    worker._process.kill()
    pool._free.put(worker)
    assert pool.compare(["1"], r"\boxed{1.0}", 20) is None
    assert pool.compare(["1"], r"\boxed{1.0}", 20)["correct"]


def test_it_works_off_the_main_thread_and_in_many_at_once():
    with ThreadPoolExecutor(4) as threads:
        assert threads.submit(threading.current_thread).result() is not threading.main_thread()
        scores = list(threads.map(lambda i: score(rf"\boxed{{{i}.0}}", str(i % 3))["reward"], range(12)))
    assert scores == [1, 1, 1] + [0] * 9


PIECES = [
    "\\boxed{",
    "}",
    "{",
    "\\frac",
    "$",
    "1",
    "x",
    "^",
    "_",
    "\\sqrt",
    "(",
    ")",
    ",",
    "=",
    "\\",
    "%",
    " ",
    "é",
    "\n",
]


@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join), st.sampled_from(["1", "x", "{"])
)
def test_nothing_raises(text, label):
    assert score(text, label, timeout=2.0)["reward"] in (0.0, 1.0)


def test_a_prompt_without_a_label_is_an_error():
    with pytest.raises(DataError, match="has no label"):
        score("1", None)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="timeout"):
        MathOptions(timeout=0)
