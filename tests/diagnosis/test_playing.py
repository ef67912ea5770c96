"""Scripts, chance, and what is seen of an episode."""

import asyncio
import random

import pytest

from miles.api import Action, DataError, Environments, Observation, Prompt, StepResult, ToolCall
from miles.diagnosis.playing import MALFORMED, by_chance, fitting, following, its_own, play, read_script, wrong_messages

PROMPT = Prompt("set:0", "set", text="alpha, (beta)")


class Echo:
    """Says again what it hears, `turns` times, and pays 1 for each."""

    def __init__(self, turns=3, tools=()):
        self.left, self.tools = turns, tools

    async def reset(self, prompt):
        return Observation(({"role": "user", "content": "gamma"},), self.tools)

    async def step(self, action):
        if action.text == "break":
            raise ValueError("broken")
        self.left -= 1
        return StepResult(({"role": "user", "content": f"you said {action.text}"},), 1.0, self.left == 0)

    async def close(self):
        self.left = 0


def played(environment, policy, max_turns=16):
    told = []
    made = Environments(lambda: environment)
    return asyncio.run(play(made, PROMPT, policy, max_turns, lambda event, seconds: told.append(event))), told


def scripted(*actions):
    return lambda *_: following(actions)


@pytest.mark.parametrize(
    ("actions", "max_turns", "end", "paid"),
    [
        (["a", Action("b"), "c", "d"], 16, "done", 3.0),
        (["a"], 16, "out of script", 1.0),
        (["a", "b", "c"], 2, "stopped after 2 turns", 2.0),
        (["a", Action("b", finish_reason="length"), "c"], 16, "cut off", 2.0),
        (["a", "break"], 16, "failed", 1.0),
    ],
)
def test_an_episode_ends_as_it_would_in_a_run(actions, max_turns, end, paid):
    environment = Echo()
    episode, told = played(environment, scripted(*actions), max_turns)
    assert (episode.end, episode.paid) == (end, paid)
    assert environment.left == 0  # closed
    assert isinstance(told[0], Observation)
    assert told[1:] == [event for pair in zip(episode.actions, episode.steps, strict=False) for event in pair] + (
        [Action("break")] if end == "failed" else []
    )
    assert (episode.fault is not None) == (end == "failed")


def test_a_script_of_the_environment_hears_its_answers():
    heard = []

    class Knowing(Echo):
        def script(self, prompt):
            step = yield "one"
            while True:
                heard.append(step.messages[0]["content"])
                step = yield Action(f"{len(heard)}")

    assert played(Knowing(), its_own)[0].end == "done"
    assert heard == ["you said one", "you said 1"]


def test_a_script_that_says_nonsense_is_the_environments_fault():
    class Wrong(Echo):
        def script(self, prompt):
            return [3]

    episode, _ = played(Wrong(), its_own)
    assert "Wrong" in str(episode.fault)
    assert "`script` says 3; an Action or its text is expected" in str(episode.fault)


def test_a_script_file(tmp_path):
    file = tmp_path / "script.jsonl"
    file.write_text(
        '"hello"\n\n{"tool_calls": [{"name": "add", "arguments": {"a": 1}}]}\n{"text": "x", "reasoning": "y"}\n'
    )
    assert read_script(file) == [
        Action("hello"),
        Action("", tool_calls=(ToolCall("add", {"a": 1}, "call_0"),)),
        Action("x", reasoning="y"),
    ]
    for wrong in ("{", "3", '{"txt": "a"}', '{"tool_calls": [3]}'):
        file.write_text(f'"a"\n{wrong}\n')
        with pytest.raises(DataError, match=r"script.jsonl, line 2: .*an action is"):
            read_script(file)


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 3, "maximum": 5},
        "way": {"enum": ["up", "down"]},
        "many": {"type": "array", "items": {"type": "boolean"}, "minItems": 1},
        "either": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0}]},
        "word": {"type": "string"},
    },
    "required": ["n", "way"],
}


def test_what_is_made_up_fits_its_schema():
    chance, seen = random.Random(0), set()
    for _ in range(200):
        value = fitting(SCHEMA, chance, ["w"])
        assert {"n", "way"} <= set(value) <= set(SCHEMA["properties"])
        assert value["n"] in (3, 4, 5)
        assert value["way"] in ("up", "down")
        assert {type(item) for item in value.get("many", [True])} == {bool}
        assert value.get("either") is None or value["either"] >= 0
        assert value.get("word", "w") == "w"
        seen |= set(value)
    assert seen == set(SCHEMA["properties"])


@pytest.mark.parametrize(
    ("schema", "low", "high"),
    [
        ({"type": "integer", "maximum": -50}, -50, -50),
        ({"type": "integer", "minimum": 1000}, 1000, 1000),
        ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, 1, 2),
        ({"type": "number", "maximum": -50}, -50, -50),
        ({"type": "number", "minimum": 0.00011, "maximum": 0.00012}, 0.00011, 0.00012),
        ({"type": "array", "minItems": 5}, 5, 5),
        ({"type": "array", "minItems": 2, "maxItems": 2}, 2, 2),
    ],
)
def test_one_bound_is_enough(schema, low, high):
    made = [fitting(schema, random.Random(seed), ["w"]) for seed in range(30)]
    sizes = [len(value) if schema["type"] == "array" else value for value in made]
    assert low <= min(sizes) <= max(sizes) <= high


def test_chance_repeats_itself_and_does_everything():
    tools = ({"type": "function", "function": {"name": "go", "parameters": SCHEMA}},)

    def actions(seed):
        return played(Echo(200, tools), by_chance(seed), 200)[0].actions

    assert actions(3) == actions(3) != actions(4)
    long = [action for seed in range(12) for action in actions(seed)]
    assert any(action in MALFORMED for action in long)
    assert any(call.name == "go" for action in long for call in action.tool_calls)
    said = {word for action in long if action not in MALFORMED for word in action.text.split()}
    assert (
        {"alpha", "gamma", "7"}
        <= said
        <= {"alpha", "beta", "gamma", "you", "said", *"0123456789"}
        | {word.strip(",") for action in MALFORMED for word in action.text.split()}
    )


def test_chance_writes_the_tags_that_an_environment_stops_at():
    class Tags(Echo):
        stop = ("</ask>", "END")

    texts = [a.text for seed in range(8) for a in played(Tags(9), by_chance(seed))[0].actions]
    assert any(text.startswith("<ask>") and text.endswith("</ask>") for text in texts)
    assert any(text.endswith("END") for text in texts)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (({"role": "user", "content": "a"}, {"role": "tool", "content": [{"type": "text"}]}), ""),
        (("a",), "a message is a mapping, not str"),
        (({"role": "judge", "content": "a"},), "no such role: 'judge'"),
        (({"role": "user", "content": 3},), "content is text (or a list of parts), not int"),
    ],
)
def test_messages_that_a_template_cannot_show(messages, problem):
    assert wrong_messages(messages).startswith(problem)
    assert bool(wrong_messages(messages)) == bool(problem)
