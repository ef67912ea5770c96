"""An environment whose tools are Python functions.

    class Shop(ToolEnvironment):
        def tools(self):
            return [search, self.buy]

What the model is told of a function comes from its type hints and its docstring (Google style, as
`transformers.utils.get_json_schema` reads it). All calls of a turn run at once; their results come back in the order of
the calls. Whatever goes wrong with a call is a result, too: the model is told, and may do better.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from miles.errors import ConfigError, DataError
from miles.targets import defined_at
from miles.types import Action, Message, Observation, Prompt, StepResult, ToolCall

logger = logging.getLogger("miles")


@dataclass(frozen=True)
class Tool:
    """A function as the model sees it, and as it is called: with its arguments checked and converted."""

    schema: dict[str, Any]
    """OpenAI tool schema."""
    function: Callable[..., Any]
    is_async: bool

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


class ToolEnvironment:
    """Answers the calls of each turn; a turn that calls nothing is the answer and ends the episode.

    Override `tools`; `judge`, if the environment itself shall pay; `reset`, if more is asked than the prompt says. What
    tools keep during an episode belongs into `self.state`: it goes on with a trajectory that was interrupted. Functions
    with `async def` run on the event loop, others in a thread each, several of one turn at the same time.
    """

    timeout: float = 30.0
    """Seconds for a call. A thread cannot be stopped: what it returns later is dropped."""
    max_result_length: int = 4000
    """Characters of a result; the rest is left out, and the model is told how much."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        """Plain data."""
        self.counts = {"tool_calls": 0, "tool_errors": 0}

    def tools(self) -> Sequence[Callable[..., Any]]:
        """The functions, bound methods included, that the model may call."""
        return ()

    async def judge(self, action: Action) -> float | None:
        """Reward of the answer. None leaves it to the rewards of the task set."""
        return None

    async def reset(self, prompt: Prompt) -> Observation:
        """Offers all tools, or those that the row names.

        Raises:
            ConfigError: a function cannot be offered: no type hints, or an argument that its docstring does not tell.
            DataError: the row names a tool that is not here.
        """
        schemas = {name: tool.schema for name, tool in self._tools.items()}
        for named in prompt.tools or ():
            if (name := named["function"]["name"]) not in schemas:
                raise DataError(f"{prompt.id} offers the tool {name!r}; there are: {', '.join(schemas) or 'none'}")
        text: tuple[Message, ...] = ({"role": "user", "content": prompt.text or ""},)
        return Observation(() if prompt.messages else text, tuple(prompt.tools or schemas.values()))

    async def step(self, action: Action) -> StepResult:
        if not action.tool_calls:
            return StepResult(reward=await self.judge(action), done=True)
        if action.finish_reason == "length":
            return StepResult(done=True)  # nobody would read the results
        results = await asyncio.gather(*map(self._result, action.tool_calls))
        self.counts["tool_calls"] += len(results)
        self.counts["tool_errors"] += sum(failed for _, failed in results)
        messages: list[Message] = [
            {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text}
            for call, (text, _) in zip(action.tool_calls, results, strict=True)
        ]
        return StepResult(tuple(messages), info=dict(self.counts))

    async def close(self) -> None:
        """Nothing is held open."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": deepcopy(self.state), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state, self.counts = deepcopy(state["state"]), dict(state["counts"])

    @functools.cached_property
    def _tools(self) -> dict[str, Tool]:
        tools = [tool_of(function) for function in self.tools()]
        named = {tool.name: tool for tool in tools}
        if len(named) != len(tools):
            raise ConfigError(f"{type(self).__qualname__}{defined_at(self)}: two tools have one name")
        return named

    async def _result(self, call: ToolCall) -> tuple[str, bool]:
        """What the model is told of a call, and whether it failed."""
        try:
            text, failed = await self._call(call), False
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            text, failed = "Error: " + "; ".join(wrong), True
        except Exception as error:
            logger.debug("tool %s raised", call.name, exc_info=True)
            text, failed = f"Error: {type(error).__name__}: {error}", True
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text to a tokenizer
        left_out = len(text) - self.max_result_length
        return (text if left_out <= 0 else f"{text[: self.max_result_length]}\n[{left_out} more characters]"), failed

    async def _call(self, call: ToolCall) -> str:
        if call.error:
            raise ValueError(call.error)
        tool = self._tools.get(call.name)
        if tool is None:
            raise LookupError(f"there is no tool {call.name!r}; there are: {', '.join(self._tools) or 'none'}")
        try:
            async with asyncio.timeout(self.timeout) as limit:
                run = tool.function if tool.is_async else functools.partial(in_thread, tool.function)
                result = await run(**call.arguments)
                if inspect.isawaitable(result):  # a plain function around an async one
                    result = await result
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"no result within {self.timeout:g} seconds") from error
            raise
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def tool_of(function: Callable[..., Any]) -> Tool:
    """Raises ConfigError when the function cannot be offered to a model."""
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        raise ConfigError(f"a tool is a function or a bound method, not {function!r}")
    if not inspect.ismethod(function):
        return _described(function)
    tool = _described(function.__func__)
    return Tool(tool.schema, functools.partial(tool.function, function.__self__), tool.is_async)


@functools.lru_cache(maxsize=256)  # environments come and go; functions that are made in one do, too
def _described(function: Callable[..., Any]) -> Tool:
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(function)
        checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)
    except Exception as error:
        raise ConfigError(f"tool {function.__qualname__}{defined_at(function)}: {error}") from error
    schema["function"].pop("return", None)  # no part of OpenAI's schemas
    return Tool(schema, checked, inspect.iscoroutinefunction(function))


async def in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The function in a thread of its own: one that hangs takes no place of others, and holds up no exit.

    For what blocks: called in an `async def` itself, it would stop everything else in the run. Whoever stops waiting (a
    time-out) leaves the thread behind, since a thread cannot be stopped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if done.done():
            return  # too late: nobody waits any more
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, raised = None, None
        try:
            result = context.run(functools.partial(function, *args, **kwargs))
        except Exception as error:
            raised = error
        except BaseException as error:  # who says exit() there ends this call, not the run
            raised = RuntimeError(repr(error))
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, raised)

    context = contextvars.copy_context()
    threading.Thread(target=work, daemon=True, name=f"miles {function}").start()
    return await done
