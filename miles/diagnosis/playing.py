"""Environments played without a model: what is done in an episode comes from a script, or from chance."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.api import (
    Action,
    ConfigError,
    DataError,
    EnvironmentFault,
    Environments,
    GuardedEnvironment,
    Message,
    Observation,
    Prompt,
    StepResult,
    ToolCall,
)

MALFORMED = (
    Action(""),
    Action("cut off in the mid", finish_reason="length"),
    Action("答え\ud800\x00"),
    Action("", tool_calls=(ToolCall("no_such_tool", {}),)),
    Action("", tool_calls=(ToolCall("f", {"raw": "{broken"}, error="not JSON"),)),
    Action("", tool_calls=(ToolCall("", {"a": [None, {"b": 1e308}]}), ToolCall("f", {}))),
    Action("wait, " * 2000),
)
"""What models do before they have learnt anything."""
ROLES = ("system", "user", "tool", "assistant")

Script = Generator[Action, StepResult, None]
"""Says what is done next; is sent the environment's answer."""
Policy = Callable[[GuardedEnvironment, Prompt, Observation], Script]
Tell = Callable[[Observation | Action | StepResult, float], None]
"""What happened, and the seconds that it took."""


@dataclass
class Episode:
    """One that was played."""

    prompt: Prompt
    actions: list[Action] = field(default_factory=list)
    steps: list[StepResult] = field(default_factory=list)
    end: str = ""
    """`done`, or why nobody went on."""
    fault: EnvironmentFault | None = None
    seconds: float = 0.0

    @property
    def paid(self) -> float:
        """All rewards together."""
        return sum(float(step.reward) for step in self.steps if step.reward is not None)


async def play(made: Environments, prompt: Prompt, policy: Policy, max_turns: int, tell: Tell) -> Episode:
    """Reset, steps, close, under the limits of `made`. What is wrong with the environment is `Episode.fault`."""
    environment, episode, started = made(), Episode(prompt), time.perf_counter()
    try:
        await _play(environment, episode, policy, max_turns, tell)
    except EnvironmentFault as fault:
        episode.end, episode.fault = "failed", fault
    finally:
        await environment.close()
    episode.seconds = time.perf_counter() - started
    return episode


async def _play(environment: GuardedEnvironment, episode: Episode, policy: Policy, max_turns: int, tell: Tell) -> None:
    started = time.perf_counter()
    observation = await environment.reset(episode.prompt)
    tell(observation, time.perf_counter() - started)
    script, step = policy(environment, episode.prompt, observation), None
    while not episode.end:
        with environment.blamed("script"):
            action = _next(script, step)
        if action is None:
            episode.end = "out of script"
            return
        episode.actions.append(action)
        tell(action, 0.0)
        started = time.perf_counter()
        step = await environment.step(action)
        tell(step, time.perf_counter() - started)
        episode.steps.append(step)
        if action.finish_reason == "length":
            episode.end = "cut off"
        elif step.done:
            episode.end = "done"
        elif len(episode.steps) >= max_turns:
            episode.end = f"stopped after {max_turns} turns"


def _next(script: Script, step: StepResult | None) -> Action | None:
    try:
        return next(script) if step is None else script.send(step)
    except StopIteration:
        return None


def wrong_messages(messages: Sequence[Any]) -> str:
    """Why chat templates would not take these; empty where they would."""
    for message in messages:
        if not isinstance(message, Mapping):
            return f"a message is a mapping, not {type(message).__name__}"
        if message.get("role") not in ROLES:
            return f"no such role: {message.get('role')!r}; there are {', '.join(ROLES)}"
        if not isinstance(message.get("content", ""), str | list):
            return f"content is text (or a list of parts), not {type(message['content']).__name__}"
    return ""


# -------------------------------------------------------------------------------------------------------------- scripts


def its_own(environment: GuardedEnvironment, prompt: Prompt, observation: Observation) -> Script:
    """What the environment's `script` says."""
    return following(environment.script(prompt))


def following(script: Iterable[Action | str]) -> Script:
    """A list of actions, or of their texts; or a generator of them, which is sent the answers."""
    steps, step = iter(script), None
    while True:
        try:
            said = steps.send(step) if isinstance(steps, Generator) else next(steps)
        except StopIteration:
            return
        if not isinstance(said, str | Action):
            raise TypeError(f"`script` says {said!r}; an Action or its text is expected")
        step = yield Action(said) if isinstance(said, str) else said


def read_script(path: Path) -> list[Action]:
    """A file of JSON lines, an action each: text, or the fields of an `Action`, with `tool_calls` as mappings.

    Raises:
        DataError: a line holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"script {path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_action(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _action(line: str, where: str) -> Action:
    try:
        said = json.loads(line)
        if isinstance(said, str):
            return Action(said)
        calls = [ToolCall(**{"id": f"call_{i}", **call}) for i, call in enumerate(said.pop("tool_calls", ()))]
        return Action(**{"text": "", **said}, tool_calls=tuple(calls))
    except (ValueError, TypeError, AttributeError) as error:
        wanted = '"text", or {"text": ..., "tool_calls": [{"name": ..., "arguments": {...}}]}'
        raise DataError(f"{where}: {error}; an action is {wanted}") from error


# --------------------------------------------------------------------------------------------------------------- chance


def by_chance(seed: int) -> Policy:
    """Calls that fit the schemas, words that were heard, and now and then something malformed."""

    def policy(environment: GuardedEnvironment, prompt: Prompt, observation: Observation) -> Script:
        chance = random.Random(f"{seed} {prompt.id}")
        stops, tools = getattr(environment, "stop", ()), observation.tools or tuple(prompt.tools or ())
        asked = [prompt.text or "", *_texts(prompt.messages or ()), *_texts(observation.messages)]
        words = [*"0123456789", *_words(asked)]
        while True:
            step = yield _anything(chance, words, tools, stops)
            words += _words(_texts(step.messages))[:100]

    return policy


def _anything(chance: random.Random, words: Sequence[str], tools: Sequence[Any], stops: Sequence[str]) -> Action:
    kind = chance.random()
    if kind < 0.1:
        return chance.choice(MALFORMED)
    if tools and kind < 0.85:
        return Action("", tool_calls=tuple(_call(chance, words, tools, i) for i in range(chance.choice((1, 1, 2)))))
    text = " ".join(chance.choices(words, k=chance.choice((1, 1, 1, 2, 5))))
    if stops and kind < 0.85:
        stop = chance.choice(stops)
        text = f"{stop.replace('</', '<')}{text}{stop}" if stop.startswith("</") else text + stop
    return Action(text)


def _call(chance: random.Random, words: Sequence[str], tools: Sequence[Any], number: int) -> ToolCall:
    function = chance.choice(tools)["function"]
    arguments = fitting(function.get("parameters", {}), chance, words)
    return ToolCall(function["name"], arguments if isinstance(arguments, dict) else {}, f"call_{number}")


def fitting(schema: Mapping[str, Any], chance: random.Random, words: Sequence[str]) -> Any:
    """A value that a JSON schema allows, as far as types, choices and bounds go. Optional properties come and go."""
    if "const" in schema or "enum" in schema:
        return chance.choice(schema.get("enum") or [schema["const"]])
    for either in ("anyOf", "oneOf"):
        if either in schema:
            return fitting(chance.choice(schema[either]), chance, words)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = chance.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        needed, properties = schema.get("required", ()), schema.get("properties", {})
        given = [name for name in properties if name in needed or chance.random() < 0.5]
        return {name: fitting(properties[name], chance, words) for name in given}
    if kind == "array":
        count = chance.randint(*_bounds(schema, "minItems", "maxItems", 0, 3))
        return [fitting(schema.get("items", {}), chance, words) for _ in range(count)]
    low, high = _bounds(schema, "minimum", "maximum", -10, 100)
    simple: dict[str, Callable[[], Any]] = {
        "integer": lambda: chance.randint(math.ceil(low), max(math.ceil(low), math.floor(high))),
        "number": lambda: min(max(round(chance.uniform(low, high), 3), low), high),
        "boolean": lambda: chance.random() < 0.5,
        "null": lambda: None,
    }
    return simple.get(kind, lambda: chance.choice(words))()


def _bounds(schema: Mapping[str, Any], least: str, most: str, low: Any, high: Any) -> tuple[Any, Any]:
    """Those of a schema. Of one that has a single bound the other one is ours, moved out of its way."""
    return schema.get(least, min(low, schema.get(most, low))), schema.get(most, max(high, schema.get(least, high)))


def _words(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for part in text.split() if (word := part.strip(".,:;!?()\"'"))]


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), str):
            yield str(message["content"])
