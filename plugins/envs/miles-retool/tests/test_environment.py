"""The environment: both protocols, what is counted, and what is the sandbox's fault."""

import asyncio
import time

import pytest
from miles_retool.environment import Retool, program_in
from miles_retool.plugin import RetoolOptions, RetoolRewardOptions
from miles_retool.reward import RetoolReward

from miles.api import Action, Prompt, Sample, ToolCall, WorkerError

PROMPT = Prompt("t:0", "t", text="What is 6 * 7?", label="42")


def play(actions, prompt=PROMPT, **options):
    """Observation and steps of one episode. Nothing hostile is run, so nothing need be protected."""

    async def main():
        environment = Retool(RetoolOptions(require=(), **options))
        observation = await environment.reset(prompt)
        return observation, [await environment.step(action) for action in actions]

    return asyncio.run(main())


def call(*codes):
    return Action(
        "", tool_calls=tuple(ToolCall("code_interpreter", {"code": code}, str(i)) for i, code in enumerate(codes))
    )


# ------------------------------------------------------------------------------------------------------------ as a tool


def test_the_tool_is_that_of_the_recipe():
    observation, _ = play([])
    (tool,) = observation.tools
    assert tool == {
        "type": "function",
        "function": {
            "name": "code_interpreter",
            "description": "A tool for executing Python code in a safe sandbox environment.",
            "parameters": {
                "type": "object",
                "properties": {
                    "code": {
                        "type": "string",
                        "description": "The Python code to execute in the sandbox environment.",
                    }
                },
                "required": ["code"],
            },
        },
    }
    assert observation.messages == ({"role": "user", "content": "What is 6 * 7?"},)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(6 * 7)", "Output:\n42"),
        ("x = 1", "Output:"),
        ("", "Error: No code provided"),
        ("raise SystemExit(3)", "Error: Process exited with code 3"),
        ("import sys; print('a'); print('b', file=sys.stderr)", "Output:\na\n\nErrors:\nb"),
        ("import time; print('a'); time.sleep(9)", "Output:\na\n\nError: Code execution timed out after 0.5 seconds"),
        ("while True: print('x')", "Output:\n" + "x\n" * 512 + "\nError: More than 1 KiB of output"),
    ],
)
def test_what_the_model_is_shown(code, shown):
    _, (step,) = play([call(code)], seconds=0.5, output_kb=1, memory_mb=100)
    (message,) = step.messages
    assert (message["role"], message["name"], message["tool_call_id"]) == ("tool", "code_interpreter", "0")
    assert message["content"] == shown
    assert not step.done


def test_a_traceback_and_a_cut():
    _, (step,) = play([call("1 / 0", "print('x' * 1000)")], max_result_length=300)
    failed, cut = (message["content"] for message in step.messages)
    assert failed.startswith("Errors:\nTraceback (most recent call last):\n")
    assert failed.endswith("ZeroDivisionError: division by zero")
    assert cut == f"Output:\n{'x' * 292}\n[708 more characters]"


def test_calls_are_counted_as_they_are_made_and_programs_as_they_are_run():
    malformed = ToolCall("code_interpreter", {"raw": "{"}, "0", error="not JSON")
    actions = [
        call("print(1)", "1 / 0"),
        Action(
            "", tool_calls=(malformed, ToolCall("browser", {}, "1"), ToolCall("code_interpreter", {"code": 3}, "2"))
        ),
        call(""),
        call("print(2)", "print(3)"),
        Action("42"),
    ]
    _, steps = play(actions, max_tool_calls=3)
    assert steps[0].info == {"tool_calls": 2, "tool_errors": 1, "programs": 2}
    assert steps[1].info == {"tool_calls": 5, "tool_errors": 4, "programs": 2}
    assert steps[2].info["programs"] == 2
    assert steps[3].info == {"tool_calls": 8, "tool_errors": 4, "programs": 3}
    assert [message["content"] for message in steps[3].messages] == [
        "Output:\n2",
        "Error: all 3 calls are used; give your answer",
    ]
    assert steps[4].done


def test_counts_go_on_with_an_interrupted_episode():
    async def main():
        first, second = (Retool(RetoolOptions(require=())) for _ in "12")
        await first.reset(PROMPT)
        await first.step(call("print(1)"))
        second.load_state_dict(first.state_dict())
        return await second.step(call("print(2)"))

    assert asyncio.run(main()).info["programs"] == 2


def test_what_is_wrong_with_the_sandbox_is_no_result(monkeypatch):
    async def broken(code):
        raise WorkerError("sandbox: no more processes")

    async def main(protocol, action):
        environment = Retool(RetoolOptions(require=(), protocol=protocol))
        await environment.reset(PROMPT)
        monkeypatch.setattr(environment._sandbox, "run", broken)
        await environment.step(action)

    for protocol, action in (("tools", call("print(1)")), ("text", Action("<code>print(1)</code>"))):
        with pytest.raises(WorkerError, match="no more processes"):
            asyncio.run(main(protocol, action))


# ------------------------------------------------------------------------------------------------------------- as text


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("so <code>\nprint(1)\n</code>", "\nprint(1)\n"),
        ("<code>```python\nprint(1)\n```</code>", "print(1)\n"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)\n``` then\n```\nprint(2)\n```", "print(2)\n"),
        ("<code>a</code> <code>b</code>", "b"),
        ("```python\nprint(1)\n```\nAnswer: \\boxed{1}", None),
        ("Answer: \\boxed{1}, and <code>print(1)</code>", "print(1)"),
        ("I write it between <code> and its end: <code>print(1)</code>", "print(1)"),
        ("<code>a</code>, which ends at </code>", "a"),
        ("a </code> b", None),
        ("<code>print(1)", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_programs_in_text(said, code):
    assert program_in(said) == code


def test_tags_without_end_take_no_time():
    """The trainer reads this in its event loop."""
    started = time.monotonic()
    assert program_in("<code>" * 50_000) is None
    assert program_in("<code>" * 50_000 + "1</code>") == "1"
    assert program_in("```python\n" * 50_000) is not None
    assert time.monotonic() - started < 1


def test_an_episode_in_text():
    observation, steps = play(
        [
            Action("Let me see. <code>\nprint(6 * 7)\n</code>"),
            Action("hm"),
            Action("", reasoning="first <code>print(1)</code>"),
            Action("", tool_calls=(ToolCall("code_interpreter", {"code": "print(2)"}),)),
            Action("<code>1 / 0</code>"),
            Action("So it is.\nAnswer: \\boxed{42}"),
        ],
        protocol="text",
    )
    system, question = observation.messages
    assert (system["role"], question) == ("system", {"role": "user", "content": "What is 6 * 7?"})
    assert observation.tools == ()
    assert all(step.inline for step in steps[:-1])
    texts = [step.messages[0]["content"] for step in steps[:-1]]
    assert texts[0] == "\n\n<interpreter>\nOutput:\n42\n</interpreter>\n\n"
    assert "neither a program nor an answer" in texts[1]
    assert texts[2] == "\n\n<interpreter>\nOutput:\n1\n</interpreter>\n\n"
    assert texts[3] == "\n\n<interpreter>\nOutput:\n2\n</interpreter>\n\n"
    assert "ZeroDivisionError" in texts[4]
    assert steps[4].info == {"tool_calls": 4, "tool_errors": 1, "programs": 4}
    assert (steps[5].done, steps[5].messages) == (True, ())


def test_a_turn_that_was_cut_off_runs_nothing():
    for protocol in ("text", "tools"):
        action = Action("<code>print(1)</code>", tool_calls=call("print(1)").tool_calls, finish_reason="length")
        _, (step,) = play([action], protocol=protocol)
        assert (step.done, step.messages, step.info) == (True, (), {})


def test_instructions():
    def roles(prompt=PROMPT, **options):
        observation, _ = play([], prompt, protocol="text", **options)
        return [(message["role"], message["content"][:5]) for message in observation.messages]

    assert roles(instructions="Do it.") == [("system", "Do it"), ("user", "What ")]
    assert roles(instructions="") == [("user", "What ")]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert roles(Prompt("t:1", "t", messages=asked)) == [("system", "Be br"), ("user", "What?")]


# ---------------------------------------------------------------------------------------------------------- the reward


def judged(text, programs, label="42", messages=None, **options):
    sample = Sample.begin(Prompt("t:0", "t", text="?", label=label, tokens=[1]), id=0, group_id=0)
    sample.text, sample.messages = text, messages or []
    if programs is not None:
        sample.metadata["environment"] = {"tool_calls": 9, "programs": programs}
    return RetoolReward(RetoolRewardOptions(**options)).score(sample)


@pytest.mark.parametrize(
    ("said", "programs", "reward"),
    [
        ("\\boxed{42}", 0, 1.0),
        ("\\boxed{42}", 16, 1.0),
        ("\\boxed{41}", None, -1.0),
        ("\\boxed{41}", 0, -1.0),
        ("\\boxed{41}", 1, -0.95),
        ("\\boxed{41}", 2, -0.9),
        ("\\boxed{41}", 8, -0.6),
        ("\\boxed{41}", 16, -0.6),
        ("42", 3, -0.85),
    ],
)
def test_the_shaping(said, programs, reward):
    score = judged(said, programs)
    assert score["reward"] == pytest.approx(reward)
    assert score["correct"] == float(reward == 1)
    assert score["programs"] == (programs or 0)


def test_other_numbers():
    score = judged("it is 41", 3, correct=2.0, wrong=0.0, per_call=0.1, most_when_wrong=0.25, require_boxed=False)
    assert score["reward"] == 0.25
    assert judged("it is 42", 0, correct=2.0, wrong=0.0, most_when_wrong=0.25, require_boxed=False)["reward"] == 2.0


def test_what_a_program_printed_is_no_answer():
    conversation = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "Output:\n\\boxed{42}"},
    ]
    assert judged("... \\boxed{42}", 1, messages=conversation)["reward"] == pytest.approx(-0.95)
    answered = [*conversation, {"role": "assistant", "content": "Answer: \\boxed{42}"}]
    assert judged("...", 1, messages=answered)["reward"] == 1.0
