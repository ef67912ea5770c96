"""Tools that are Python functions: what the model is told of them, and of what becomes of its calls."""

import asyncio
import functools
import json
import threading
import time

import pytest

from miles.api import (
    Action,
    ConfigError,
    DataError,
    GenerateContext,
    GenerateResult,
    Prompt,
    Sample,
    SamplingParams,
    Status,
    ToolCall,
    ToolEnvironment,
)
from miles.config import Spec
from miles.testing import installed, tiny

ASKED = Prompt("set:0", "set", messages=[{"role": "user", "content": "?"}])


def add(a: int, b: float = 2) -> float:
    """Adds.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def fail(why: str) -> None:
    """Fails.

    Args:
        why: The reason.
    """
    raise KeyError(why)


def shout(text: str, times: int) -> str:
    """Says it again and again.

    Args:
        text: What.
        times: How often.
    """
    return text * times


def leave() -> None:
    """Leaves."""
    raise SystemExit(3)


class Shop(ToolEnvironment):
    max_result_length = 20

    def tools(self):
        return [add, fail, shout, leave, self.buy]

    async def buy(self, things: list[str]) -> dict:
        """Buys.

        Args:
            things: Their names.
        """
        for thing in things:
            self.state[thing] = self.state.get(thing, 0) + 1
        return self.state

    async def judge(self, action):
        return float(action.text == "done")


def ask(environment, *calls, finish_reason="stop"):
    """What the model is told of these calls: (name, arguments)."""

    async def main():
        made = tuple(ToolCall(name, arguments, f"call_{i}") for i, (name, arguments) in enumerate(calls))
        return await environment.step(Action("", tool_calls=made, finish_reason=finish_reason))

    step = asyncio.run(main())
    assert [(m["role"], m["name"], m["tool_call_id"]) for m in step.messages] == [
        ("tool", name, f"call_{i}") for i, (name, _) in enumerate(calls)
    ]
    assert not step.done
    return [message["content"] for message in step.messages]


def test_schemas_come_from_hints_and_docstrings():
    observation = asyncio.run(Shop().reset(ASKED))
    assert observation.messages == ()
    first, *_, last = observation.tools
    assert first == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first."},
                    "b": {"type": "number", "description": "The second."},
                },
                "required": ["a"],
            },
        },
    }
    assert last["function"]["parameters"]["properties"] == {
        "things": {"type": "array", "items": {"type": "string"}, "description": "Their names."}
    }


def test_a_prompt_that_is_text_becomes_a_question_and_a_row_may_offer_some_of_the_tools():
    shop, row = Shop(), [{"type": "function", "function": {"name": "add"}}]
    observation = asyncio.run(shop.reset(Prompt("set:0", "set", text="12 + 7?", tools=row)))
    assert observation.messages == ({"role": "user", "content": "12 + 7?"},)
    assert observation.tools == tuple(row)
    with pytest.raises(DataError, match="set:0 offers the tool 'sell'; there are: add, fail, shout, leave, buy"):
        asyncio.run(shop.reset(Prompt("set:0", "set", text="?", tools=[{"function": {"name": "sell"}}])))


def test_arguments_are_checked_and_converted_and_results_are_text():
    shop = Shop()
    assert ask(shop, ("add", {"a": "3"}), ("add", {"a": 1, "b": 0.5}), ("buy", {"things": ["ü"]})) == [
        "5", "1.5", '{"ü": 1}',
    ]  # fmt: skip
    assert shop.counts == {"tool_calls": 3, "tool_errors": 0}


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("add", {}, "Error: a: Missing required argument"),
        ("add", {"a": "x"}, "Error: a: Input should be a valid integer, unable to parse string as an integer"),
        ("add", {"a": 1, "c": 2}, "Error: c: Unexpected keyword argument"),
        ("buy", {"things": ["a", 1]}, "Error: things.1: Input should be a valid string"),
        ("buy", {"self": 1, "things": []}, "Error: self: Got multiple values for argument"),
        ("fail", {"why": "no such file"}, "Error: KeyError: 'no such file'"),
        ("sell", {}, "Error: LookupError: there is no tool 'sell'; there are: add, fail, shout, leave, buy"),
        ("leave", {}, "Error: RuntimeError: SystemExit(3)"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(name, arguments, told):
    shop = Shop()
    shop.max_result_length = 200
    [result] = ask(shop, (name, arguments))
    assert result.startswith(told)
    assert shop.counts == {"tool_calls": 1, "tool_errors": 1}


def test_a_call_that_could_not_be_parsed():
    call = ToolCall("", {"raw": "{x"}, "call_0", error="the call is not JSON")
    shop = Shop()
    shop.max_result_length = 100
    step = asyncio.run(shop.step(Action("", tool_calls=(call,))))
    assert step.messages[0]["content"] == "Error: ValueError: the call is not JSON"
    assert step.info == {"tool_calls": 1, "tool_errors": 1}


def test_long_results_are_cut_and_half_characters_replaced():
    assert ask(Shop(), ("shout", {"text": "ab", "times": 12})) == ["ab" * 10 + "\n[4 more characters]"]
    assert ask(Shop(), ("shout", {"text": "\ud800", "times": 2})) == ["??"]


def test_a_turn_without_calls_is_the_answer():
    step = asyncio.run(Shop().step(Action("done")))
    assert (step.reward, step.done, step.messages) == (1.0, True, ())
    assert asyncio.run(ToolEnvironment().step(Action("done"))).reward is None


def test_calls_of_a_turn_that_was_cut_off_are_not_made():
    shop = Shop()
    call = ToolCall("buy", {"things": ["x"]})
    step = asyncio.run(shop.step(Action("", tool_calls=(call,), finish_reason="length")))
    assert (step.done, step.messages, shop.state) == (True, (), {})


def test_calls_of_one_turn_run_at_once():
    """Each waits for the other: one after the other they would wait for ever."""
    barrier, both = threading.Barrier(2), asyncio.Event()
    waiting = []

    def meet() -> str:
        """Meets."""
        barrier.wait(20)
        return "met"

    async def greet() -> str:
        """Greets."""
        waiting.append(1)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        return "greeted"

    class Pair(ToolEnvironment):
        def tools(self):
            return [meet, greet]

    said = ask(Pair(), ("meet", {}), ("greet", {}), ("meet", {}), ("greet", {}))
    assert said == ["met", "greeted", "met", "greeted"]


def test_a_call_takes_no_longer_than_its_time():
    release = threading.Event()

    def hang() -> None:
        """Hangs."""
        release.wait(20)

    async def dawdle() -> None:
        """Dawdles."""
        await asyncio.sleep(3600)

    async def give_up() -> None:
        """Gives up by itself."""
        raise TimeoutError("the server does not answer")

    class Slow(ToolEnvironment):
        timeout = 0.05

        def tools(self):
            return [hang, dawdle, give_up]

    started = time.monotonic()
    late = "Error: TimeoutError: no result within 0.05 seconds"
    assert ask(Slow(), ("hang", {}), ("dawdle", {}), ("give_up", {})) == [
        late, late, "Error: TimeoutError: the server does not answer",
    ]  # fmt: skip
    assert time.monotonic() - started < 15
    release.set()


def test_decorated_functions_keep_their_kind():
    def logged(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    class Decorated(ToolEnvironment):
        def tools(self):
            return [logged(add), self.wait]

        @logged
        async def wait(self, steps: int) -> str:
            """Waits.

            Args:
                steps: How long.
            """
            await asyncio.sleep(0)
            return f"{type(self).__name__} waited {steps}"

    assert ask(Decorated(), ("add", {"a": 1}), ("wait", {"steps": 3})) == ["3", "Decorated waited 3"]


def undescribed(a: int) -> int:
    """Says nothing of its argument."""
    return a


def untyped(a):
    """Without hints.

    Args:
        a: Something.
    """
    return a


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ([undescribed], "tool undescribed .*test_tools.py:.*no description for the argument 'a'"),
        ([untyped], "missing a type hint"),
        ([lambda: 1], "no docstring"),
        ([len], "a function or a bound method, not <built-in"),
        ([add, add], "two tools have one name"),
    ],
)
def test_functions_that_cannot_be_offered(tools, why):
    class Odd(ToolEnvironment):
        def tools(self):
            return tools

    with pytest.raises(ConfigError, match=why):
        asyncio.run(Odd().reset(ASKED))


def test_state_goes_on_in_another_object():
    first, second = Shop(), Shop()
    ask(first, ("buy", {"things": ["a"]}))
    state = json.loads(json.dumps(first.state_dict()))
    ask(first, ("buy", {"things": ["a"]}))
    second.load_state_dict(state)
    assert ask(second, ("buy", {"things": ["b"]})) == ['{"a": 1, "b": 1}']
    assert second.counts == {"tool_calls": 2, "tool_errors": 0}


def test_an_episode_with_parallel_calls():
    """The results stand in the stream in the order of the calls; the answer is paid."""
    registry = installed()
    chat = tiny.chat_format(registry)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": %d}}\n</tool_call>'
    lines = ["".join(call % a for a in (5, 1, 3)), "done"]
    heard = []

    async def engine(request):
        tokens = [*chat.render_text(lines[len(heard)]), chat.end_of_turn_id]
        heard.append(request.tokens)
        return GenerateResult(tokens, [-1.0] * len(tokens), "stop", [1] * len(tokens))

    context = GenerateContext(engine, chat, SamplingParams(), make_environment=Shop)
    sample = Sample.begin(Prompt("set:0", "set", text="?", tokens=chat.render_text("?")), id=1, group_id=1)
    sample = asyncio.run(registry.build("generate_functions", Spec(name="multi_turn"))(context, sample))
    assert (sample.status, sample.error) == (Status.COMPLETED, None)
    between = [{"role": "tool", "content": text} for text in ("7", "3", "5")]
    first = sample.turns[0]
    assert sample.tokens[first.end : sample.turns[1].start] == chat.render_next(between)
    assert [turn.reward for turn in sample.turns] == [None, 1.0]
    assert sample.metadata["environment"] == {"tool_calls": 3, "tool_errors": 0}
    assert "adds" in chat.decode(sample.tokens[: sample.prompt_length]).lower()
