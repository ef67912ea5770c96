"""`miles env check`: an environment played without any model."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from miles.api import Action, EnvironmentLimits, Environments, Observation, Prompt, StepResult, ToolCall, defined_at
from miles.cli import Call
from miles.config import Keys, Spec, TaskSet
from miles.config.values import from_text
from miles.data.prompts import read_prompt
from miles.data.readers import open_rows
from miles.diagnosis.playing import Episode, Policy, by_chance, following, its_own, play, read_script, wrong_messages
from miles.errors import ConfigError, DataError
from miles.log import counted
from miles.options import options_of
from miles.plugins import load_plugins
from miles.registry import Entry, Registry

HELP = """usage: miles env check NAME [--option KEY=VALUE ...] [--limit KEY=VALUE ...] [--prompt FILE|JSON]
                      [--input-key KEY] [--label-key KEY] [--metadata-key KEY] [--tool-key KEY] [--script FILE]
                      [--episodes N] [--max-turns N] [--seed N] [--no-contract]

Plays an environment without any model: by its script, if there is one, and by chance (calls that fit the schemas, words
it said, malformed calls). Prints the first episode of each, says how fast the others were, and runs the contract of
environments. NAME is that of a component, or module:Class.
  --option KEY=VALUE   an option of the environment, as in a config
  --limit KEY=VALUE    calls, episodes, reset_timeout, step_timeout, close_timeout: data.sets[].environment_limits
  --prompt FILE|JSON   rows that episodes start from, one after the other: a prompt file (FILE@[3:4] is its fourth
                       row), or one row as JSON. Without it the prompt is a question mark
  --input-key KEY ...  what its columns are called, where it is not input, label, metadata, tools: as of miles train
  --script FILE        what to do, as JSON lines: texts, or {"tool_calls": [{"name": ..., "arguments": {...}}]}. Without
                       it, what the environment's own `script(prompt)` says, if it has one
  --episodes N         by script, and as many by chance (8); all but the first at once
  --max-turns N        of an episode (16)
  --seed N             of chance (0)
  --no-contract        only play
Exit code 1 when something is wrong, with what, where and how to mend it; docs/environments.md has an example."""

BLOCKED = 0.25
"""Seconds; a call that keeps the event loop to itself for longer is a fault."""
KEY_FLAGS = {"input": "--input-key", "label": "--label-key", "metadata": "--metadata-key", "tools": "--tool-key"}
SHOWN = 300
"""Characters of a message."""


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line."""

    name: str
    options: dict[str, str]
    limits: EnvironmentLimits
    prompt: str | None
    keys: Keys
    script: Path | None
    episodes: int
    max_turns: int
    seed: int
    contract: bool


def run(call: Call) -> int:
    """Play, check, print."""
    if call.help:
        print(HELP)
        return 0
    wish = read_wish(call)
    registry = Registry(load_plugins(block=call.blocked, strict=False))
    entry = registry.entry("environments", wish.name)
    kinds = {name: option.annotation for name, option in options_of(entry.component.options).items()}
    options = {name: from_text(text, kinds.get(name, Any)) for name, text in wish.options.items()}
    spec = Spec(name=wish.name, options=options)
    build = partial(registry.build, "environments", spec)
    faults: Counter[str] = Counter()
    prompts = read_prompts(wish, spec)
    has_script = asyncio.run(show(entry, build, wish.limits))
    played = asyncio.run(play_all(wish, build, has_script, prompts, faults))
    if wish.contract:
        print_contract(build, wish, played, faults)
    for fault, count in faults.items():
        print(f"FAULT {fault}" + (f"\n      {count} times" if count > 1 else ""))
    print(counted(len(faults), "fault") if faults else "no fault was found")
    return 1 if faults else 0


# ------------------------------------------------------------------------------------------------------ what was asked


def read_wish(call: Call) -> Wish:
    """Raises ConfigError."""
    options, limits = _pairs(call, "--option"), _pairs(call, "--limit")
    known: dict[str, Any] = {field.name: float for field in fields(EnvironmentLimits)} | {"calls": int, "episodes": int}
    for name in limits:
        if name not in known:
            raise ConfigError(f"--limit {name}: there is no such limit; limits: {', '.join(known)}")
    numbers = {flag: _count(call, flag, default) for flag, default in (("--episodes", 8), ("--max-turns", 16))}
    prompt, script, seed = (call.take_value(flag) for flag in ("--prompt", "--script", "--seed"))
    named = {name: call.take_value(flag) for name, flag in KEY_FLAGS.items()}
    contract = not call.take("--no-contract")
    if len(call.words) != 2 or call.words[0] != "check":
        said = " ".join(call.words) or "nothing"
        raise ConfigError(f"miles env is followed by: check NAME; not by {said!r}. See `miles env --help`")
    try:
        most = EnvironmentLimits(**{name: kind(limits[name]) for name, kind in known.items() if name in limits})
        drawn = int(seed or 0)
    except ValueError as error:
        raise ConfigError(f"--limit and --seed take numbers: {error}") from error
    return Wish(
        call.words[1], options, most, prompt, Keys(**{name: key for name, key in named.items() if key is not None}),
        Path(script) if script else None, numbers["--episodes"], numbers["--max-turns"], drawn, contract,
    )  # fmt: skip


def _pairs(call: Call, flag: str) -> dict[str, str]:
    found = {}
    while (pair := call.take_value(flag)) is not None:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {pair}: written KEY=VALUE")
        found[name] = value
    return found


def _count(call: Call, flag: str, default: int) -> int:
    text = call.take_value(flag) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{flag} {text}: a whole number from 1 on is expected")
    return int(text)


def read_prompts(wish: Wish, spec: Spec) -> list[Prompt]:
    """The rows that were named, as a run would read them; or a question mark.

    Raises:
        DataError: a row is malformed, or there is none.
    """
    task_set, text = TaskSet(name="check", environment=spec, keys=wish.keys), wish.prompt
    if text is None:
        return [Prompt("check:0", "check", text="?")]
    if text.lstrip().startswith("{"):
        try:
            return [read_prompt(json.loads(text), task_set, 0, "--prompt")]
        except ValueError as error:
            raise DataError(f"--prompt: {error}") from error
    rows = open_rows(text)
    few = range(min(len(rows), wish.episodes))
    if not few:
        raise DataError(f"--prompt {text}: there is no row")
    return [read_prompt(rows[i], task_set, rows.numbers[i], rows.where(i), rows.nullable) for i in few]


# -------------------------------------------------------------------------------------------------------------- playing


async def show(entry: Entry, build: Callable[[], Any], limits: EnvironmentLimits) -> bool:
    """Print what is going to be played; returns whether it has a script of its own."""
    made = Environments(build, limits)
    environment = made()
    print_head(entry, environment.environment, made.limits or limits)
    await environment.close()
    return hasattr(environment, "script")


async def play_all(
    wish: Wish, build: Callable[[], Any], has_script: bool, prompts: Sequence[Prompt], faults: Counter[str]
) -> dict[str, list[Episode]]:
    """By script and by chance: the first episode of each is printed as it goes, the others are played at once."""
    played = {}
    actions = read_script(wish.script) if wish.script else None
    if actions is not None or has_script:
        own: Policy = its_own if actions is None else lambda *_: following(actions or ())
        played["script"] = await _played("script", [own] * wish.episodes, wish, build, prompts, faults)
        if actions is None:
            _judge_script(played["script"], faults)
    policies = [by_chance(wish.seed + i) for i in range(wish.episodes)]
    played["chance"] = await _played("chance", policies, wish, build, prompts, faults)
    return played


async def _played(
    name: str,
    policies: Sequence[Policy],
    wish: Wish,
    build: Callable[[], Any],
    prompts: Sequence[Prompt],
    faults: Counter[str],
) -> list[Episode]:
    made = Environments(build, wish.limits)
    pairs = list(zip(islice(cycle(prompts), len(policies)), policies, strict=True))
    print(f"by {name}, from prompt {pairs[0][0].id}")
    episodes = [await play(made, *pairs[0], wish.max_turns, print_event)]
    print(f"  end        {episodes[0].end}; paid {episodes[0].paid:g}; {_time(episodes[0].seconds)}\n")
    loads, started = [made.metrics()], time.perf_counter()
    episodes += await asyncio.gather(*(play(made, *pair, wish.max_turns, lambda *_: None) for pair in pairs[1:]))
    seconds = time.perf_counter() - started
    ends = ", ".join(f"{count} {end}" for end, count in Counter(e.end for e in episodes).most_common())
    paid = [episode.paid for episode in episodes]
    print(f"by {name}: {counted(len(paid), 'episode')} ({ends}); paid {min(paid):g} to {max(paid):g}")
    if load := made.metrics():
        loads.append(load)
        print(
            f"  all but the first at once: {(len(paid) - 1) / seconds:,.1f} episodes/s; most at once "
            f"{counted(int(load['calls_max']), 'call')}, {load['episodes_max']:.0f} open; a call took "
            f"{_time(load['call_time'])} and waited {_time(load['wait_time'])}"
        )
    print()
    blocked = load.get("blocked_max", 0.0)  # not of the first episode, which may import something
    if blocked > BLOCKED:  # once more: the machine may have stood still
        await asyncio.gather(*(play(made, *pair, wish.max_turns, lambda *_: None) for pair in pairs[1:]))
        blocked = min(blocked, made.metrics()["blocked_max"])
    if blocked > BLOCKED:
        remedy = "call what blocks by `await miles.api.in_thread(function, ...)`, or use an asynchronous client"
        _note(faults, f"a call kept the event loop to itself for {_time(blocked)}: all else stood still", remedy)
    if any(load.get("close_errors") for load in loads):
        _note(faults, "closing failed or took too long, as was logged", "make `close` safe at any time, and quick")
    _judge(episodes, wish, faults)
    return episodes


# -------------------------------------------------------------------------------------------------------------- judging


def _judge(episodes: Sequence[Episode], wish: Wish, faults: Counter[str]) -> None:
    """Note what is wrong with what was seen."""
    for episode in episodes:
        if episode.fault is not None:
            _note(faults, str(episode.fault), _remedy(episode, wish))
        for action, step in zip(episode.actions, episode.steps, strict=False):
            if problem := wrong_messages(step.messages):
                remedy = "return messages that a chat template can show"
                _note(faults, f"what it said to {_short(action)}: {problem}", remedy)
            if not step.done and not step.messages and action.finish_reason != "length":
                remedy = "say something: the model speaks again, and would answer itself"
                _note(faults, f"it went on without a word after {_short(action)}", remedy)


def _note(faults: Counter[str], what: str, remedy: str) -> None:
    seen = (fault for fault in faults if fault.startswith(f"{what}\n"))  # with the remedy of its first time
    faults[next(seen, f"{what}\n      {remedy}")] += 1


def _remedy(episode: Episode, wish: Wish) -> str:
    assert episode.fault is not None
    facts = episode.fault.facts
    if facts["kind"] == "timeout":
        return "make it faster, bound what it waits for and say so to the model, or allow more: --limit and `limits`"
    if facts["method"] == "reset" and wish.prompt is None:
        return "if it needs more of a prompt than a question mark, give one: --prompt"
    if facts["method"] == "step" and episode.actions:
        return f"answer in a message, or with done=True; the action was {_short(episode.actions[-1])}"
    return f"mend `{facts['method'] or 'it'}`"


def _judge_script(episodes: Sequence[Episode], faults: Counter[str]) -> None:
    for episode in episodes:
        if episode.end not in ("done", "failed"):
            what = f"its own `script` leads to no end: {episode.end} after {counted(len(episode.steps), 'step')}"
            _note(faults, what, "let `script` play until `done`, or allow more turns: --max-turns")


def print_contract(
    build: Callable[[], Any], wish: Wish, played: dict[str, list[Episode]], faults: Counter[str]
) -> None:
    """The standard tests of environments, on the first episode that was played."""
    policy, episodes = next(iter(played.items()))
    if any(episode.fault is not None for episode in episodes) and (policy == "script" or not episodes[0].steps):
        print(f"contract: left out: it would meet the faults of the episodes by {policy} again\n")
        return
    try:
        from miles.testing.environments import LEFT_OUT, EnvironmentContract, broken_promises
    except ImportError as error:
        print(f"contract: left out ({error}): pip install 'miles[testing]'\n")
        return
    passed, failed, left_out = 0, 0, []
    for name, outcome in broken_promises(build, wish.limits, episodes[0].prompt, episodes[0].actions).items():
        if outcome.startswith(LEFT_OUT):
            left_out.append(f"  {name}: {outcome}")
        elif outcome:
            failed += 1
            why = getattr(EnvironmentContract, name).__doc__ or ""
            _note(faults, f"contract, {name}: {outcome}", " ".join(why.split()))
        else:
            passed += 1
    print(f"contract: {counted(passed, 'test')} passed, {failed} failed", *left_out, "", sep="\n")


# ------------------------------------------------------------------------------------------------------------- printing


def print_head(entry: Entry, environment: Any, limits: EnvironmentLimits) -> None:
    """What is played, and the limits that hold."""
    holding = {name: value for name, value in asdict(limits).items() if value is not None}
    print(f"{entry}: {type(environment).__qualname__}{defined_at(environment)}")
    print(f"limits: {', '.join(f'{name} {value:g}' for name, value in holding.items())}\n")


def print_event(event: Observation | Action | StepResult, seconds: float) -> None:
    """A part of an episode, as it happens."""
    if isinstance(event, Action):
        lines = list(_action_lines(event))
    else:
        lines = [_line(message.get("role", "?"), message.get("content", "")) for message in event.messages]
    if isinstance(event, Observation):
        lines += [_line("tool", _tool(tool)) for tool in event.tools]
        lines.append(_line("", f"[reset, {_time(seconds)}]"))
    if isinstance(event, StepResult):
        paid = "nothing paid" if event.reward is None else f"paid {float(event.reward):g}"
        info = f", {dict(event.info)}" if event.info else ""
        lines.append(_line("", f"[{paid}{', done' if event.done else ''}, {_time(seconds)}{info}]"))
    print("\n".join(lines), flush=True)


def _action_lines(action: Action) -> Iterator[str]:
    if action.text or not action.tool_calls:
        cut = " (cut off)" if action.finish_reason == "length" else ""
        yield _line(">", repr(action.text) + cut)
    for call in action.tool_calls:
        yield _line("> calls", _call(call))


def _line(lead: str, content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    text = text.encode("utf-8", "replace").decode("utf-8")
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} [{len(text) - SHOWN} more characters]"
    return f"  {lead:<10} " + shown.replace("\n", "\n" + " " * 13)


def _call(call: ToolCall) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})" + (f"  [malformed: {call.error}]" if call.error else "")


def _tool(tool: Any) -> str:
    function = tool.get("function", {})
    properties = function.get("parameters", {}).get("properties", {})
    needed = function.get("parameters", {}).get("required", ())
    shown = [f"{name}{'' if name in needed else '?'}: {kind.get('type', 'any')}" for name, kind in properties.items()]
    return f"{function.get('name')}({', '.join(shown)})  {str(function.get('description', '')).split(chr(10))[0]}"


def _short(action: Action) -> str:
    text = "; ".join(" ".join(line.split()) for line in _action_lines(action))
    return text if len(text) <= 120 else text[:117] + "..."


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
