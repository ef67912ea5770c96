"""`miles env check`: traces, speed, faults and exit codes."""

import re
import sys

import pytest

GUESS = """
from dataclasses import dataclass

from miles.api import *


@dataclass
class Options:
    highest: int = 9


class Guess:
    limits = EnvironmentLimits(calls=2, step_timeout=5)

    def __init__(self, options: Options):
        self.highest = options.highest

    async def reset(self, prompt):
        self.secret = int(prompt.label or 7)
        return Observation(({"role": "user", "content": f"A number from 1 to {self.highest}."},))

    async def step(self, action):
        right = action.text.strip() == str(self.secret)
        return StepResult(({"role": "user", "content": "yes" if right else "no"},), float(right), right)

    async def close(self):
        pass

    def script(self, prompt):
        step = yield "1"
        for number in range(2, self.highest + 1):
            if step.done:
                return
            step = yield str(number)
"""


@pytest.fixture
def world(tmp_path):
    """`world((old, new), ...)`: the module `world`, with these replacements in it."""

    def write(*changes):
        source = GUESS
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (tmp_path / "world.py").write_text(source)

    yield write
    sys.modules.pop("world", None)


def test_an_environment_that_is_right(miles, world):
    world()
    code, out, err = miles("env", "check", "world:Guess", "--option", "highest=8", "--prompt", '{"label": 3}')
    assert (code, err) == (0, "")
    head, by_script = out.split("\n\n")[:2]
    assert re.fullmatch(
        r"environment 'world:Guess': Guess \(.*world.py:12\)\n"
        r"limits: calls 2, reset_timeout 600, step_timeout 5, close_timeout 30",
        head,
    )
    assert re.sub(r"[\d.]+ m?s", "TIME", by_script).splitlines() == [
        "by script, from prompt check:0",
        "  user       A number from 1 to 8.",
        "             [reset, TIME]",
        "  >          '1'",
        "  user       no",
        "             [paid 0, TIME]",
        "  >          '2'",
        "  user       no",
        "             [paid 0, TIME]",
        "  >          '3'",
        "  user       yes",
        "             [paid 1, done, TIME]",
        "  end        done; paid 1; TIME",
    ]
    assert "by script: 8 episodes (8 done); paid 1 to 1" in out
    assert re.search(r"episodes/s; most at once \d calls?, 7 open", out)
    assert "by chance, from prompt check:0" in out
    assert re.search(r"contract: 10 tests passed, 0 failed\n  test_a_half_\w+: left out: offers no state_dict", out)
    assert out.endswith("no fault was found\n")


PARSING = ("right = action.text.strip()", "right = str(int(action.text))")
BLOCKING = ("right =", "__import__('time').sleep(0.3); right =")
HANGING = ("right =", "await __import__('asyncio').sleep(60); right =")
NO_TEXT = ('"yes" if right else "no"', "3")
SILENT = ("StepResult(({", "StepResult(() if not right else ({")
STOPPING = ("step = yield str(number)", "return")
UNCLOSED = ("        pass", "        raise OSError('socket gone')")
PICKY = ("int(prompt.label or 7)", "prompt.metadata['n']")
FORGETFUL = ("limits =", "tries = []\n    limits =")
SHARED = ("right =", "Guess.tries.append(1); right =")


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        (
            [PARSING],
            r"ValueError: invalid literal .*world.py:\d+\)",
            "answer in a message, or with done=True",
        ),
        ([BLOCKING], "kept the event loop to itself for ", "in_thread"),
        ([HANGING], r"`step` took longer than 0.2 s .*\n.*\n +16 times", "--limit"),
        ([NO_TEXT], "what it said to > .*: content is text", "that a chat template can show"),
        ([SILENT], "it went on without a word after >", "say something"),
        ([STOPPING], "its own `script` leads to no end: out of script after 1 step", "play until `done`"),
        ([UNCLOSED], "closing failed", "make `close` safe"),
        ([PICKY], "KeyError: 'n'", "give one: --prompt"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(miles, world, changes, what, remedy):
    world(*changes)
    limit = "step_timeout=0.2" if HANGING in changes else "step_timeout=20"
    few = ("--episodes", "2", "--max-turns", "3") if BLOCKING in changes else ()
    code, out, _ = miles("env", "check", "world:Guess", "--no-contract", "--limit", limit, *few)
    assert code == 1
    faults = out.partition("\nFAULT ")[2]
    assert re.search(what, faults), out
    assert remedy in faults


def test_one_fault_is_told_once_whatever_was_done_before_it(miles, world):
    world(("right = action", "raise OSError('gone'); right = action"))
    _, out, _ = miles("env", "check", "world:Guess", "--no-contract", "--episodes", "4")
    assert out.count("OSError: gone") == 1
    assert out.endswith("\n      8 times\n1 fault\n")


def test_every_environment_that_is_made_is_closed(miles, world):
    world(
        ("limits =", "made, closed = [], set()\n    limits ="),
        ("        self.highest =", "        Guess.made.append(self)\n        self.highest ="),
        ("        pass", "        Guess.closed.add(id(self))"),
    )
    assert miles("env", "check", "world:Guess")[0] == 0
    guess = sys.modules["world"].Guess
    assert len(guess.made) > 2 * 8
    assert [made for made in guess.made if id(made) not in guess.closed] == []


def test_a_broken_promise_is_a_fault(miles, world):
    world(FORGETFUL, SHARED, ('"yes" if right else "no"', "str(len(Guess.tries))"))
    code, out, _ = miles("env", "check", "world:Guess", "--episodes", "1")
    assert code == 1
    assert "FAULT contract, test_two_at_once_do_not_meet: the same actions had other answers" in out
    assert "Hundreds of trajectories run side by side" in out


@pytest.mark.parametrize("change", [PICKY, ("right = action", "raise OSError; right = action")])
def test_no_contract_on_what_has_failed_already(miles, world, change):
    world(change)
    code, out, _ = miles("env", "check", "world:Guess", "--episodes", "1")
    assert code == 1
    assert "contract: left out: it would meet the faults of the episodes by script again" in out


def test_a_script_file_and_a_prompt_file(miles, world, tmp_path):
    world()
    (tmp_path / "rows.jsonl").write_text('{"label": 3}\n{"label": 5}\n')
    (tmp_path / "moves.jsonl").write_text('"4"\n"5"\n')
    asked = ["env", "check", "world:Guess", "--prompt", "rows.jsonl", "--script", "moves.jsonl", "--no-contract"]
    code, out, _ = miles(*asked, "--episodes", "4")
    assert code == 0
    assert "by script: 4 episodes (2 out of script, 2 done); paid 0 to 1" in out
    assert "by script, from prompt check:1" in miles(*asked[:4], "rows.jsonl@[1:2]", *asked[5:])[1]


def test_columns_of_a_prompt_file_that_are_called_otherwise(miles, world):
    world(('f"A number', 'f"{prompt.text} A number'), ("prompt.label or 7", "prompt.metadata['n'] + prompt.label"))
    row = '{"prompt": "Guess!", "answer": 1, "extra": {"n": 2}}'
    keys = ["--input-key", "prompt", "--label-key=answer", "--metadata-key", "extra"]
    code, out, err = miles("env", "check", "world:Guess", "--prompt", row, *keys, "--no-contract")
    assert (code, err) == (0, "")
    assert "  user       Guess! A number from 1 to 9." in out
    assert "  >          '3'\n  user       yes" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "miles env is followed by: check NAME; not by 'check'"),
        (["play", "world:Guess"], "check NAME"),
        (["check", "gues"], "no installed plugin offers the environment 'gues'"),
        (["check", "world:Guess", "--option", "high=3"], "unknown option"),
        (["check", "world:Guess", "--option", "highest=x"], "highest='x'"),
        (["check", "world:Guess", "--option", "highest"], "--option highest: written KEY=VALUE"),
        (["check", "world:Guess", "--limit", "call=3"], "limits: calls, episodes, reset_timeout"),
        (["check", "world:Guess", "--limit", "calls=a"], "take numbers"),
        (["check", "world:Guess", "--limit", "calls=0"], "must be more than 0"),
        (["check", "world:Guess", "--episodes", "0"], "--episodes 0: a whole number"),
        (["check", "world:Guess", "--prompt", "{label"], "--prompt: "),
        (["check", "world:Guess", "--prompt", "no.jsonl"], "no such file"),
        (["check", "world:Guess", "--prompt", '{"label": 3}', "--label-key", "answer"], "no key 'answer'"),
        (["check", "world:Guess", "--script", "no.jsonl"], "no such file"),
        (["check", "world:Guess", "--sript", "no.jsonl"], "--sript"),
    ],
)
def test_what_was_asked_wrongly(miles, world, words, said):
    world()
    code, _, err = miles("env", *words)
    assert code == 2
    assert said in err


def test_help(miles):
    code, out, _ = miles("env", "--help")
    assert code == 0
    assert "--script FILE" in out
