"""Environment `openreward`: a task of an OpenReward environment, played over a session of its own."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from openreward import ToolSpec, convert_messages, sanitize_tool_schema
from openreward.api.environments.types import Task, ToolOutput
from openreward.api.errors import ToolCallError

from miles.api import (
    Action,
    DataError,
    EnvironmentLimits,
    Message,
    Observation,
    Prompt,
    StepResult,
    ToolCall,
    parse_hermes,
)
from miles_openreward.plugin import API_KEY, PAID, OpenRewardOptions, system_prompt
from miles_openreward.sessions import Session, connection
from miles_openreward.upload import Transcript, uploader

T = TypeVar("T")
NO_CALL = "That called no tool. Go on by calling one."
STRUCK_OUT = 8
"""Characters of the shortest secret that is struck out of what a server says; shorter ones may be there by chance."""
TASK = tuple(field.name for field in fields(Task))


class SessionError(RuntimeError):
    """The environment broke, or cannot be reached."""


class OpenReward:
    """Plays the task that the row's metadata names, as `miles_openreward.prepare_tasks` writes it.

    The environment pays, and ends the episode, through its tools. Calls of a turn are made one after the other, up to
    one that ends the episode. A call that does not fit (no such tool, wrong arguments, no JSON) is answered with what
    is wrong. A tool that breaks fails the sample: its session is gone. A turn without a call is the answer where the
    environment takes one (its `@terminal` tool); elsewhere the model is told to call. A turn that was cut off is not
    played.
    """

    limits = EnvironmentLimits(reset_timeout=900)  # a hosted one may have to start a machine first

    def __init__(self, options: OpenRewardOptions):
        self.options = options
        self.secrets = options.confidential()
        hidden = {**self.secrets, API_KEY: os.environ.get(API_KEY, "")}
        long = {name: value for name, value in hidden.items() if len(value) >= STRUCK_OUT}
        spelled = {spelling: name for name, value in long.items() for spelling in spellings(value)}
        self._struck_out = sorted(spelled.items(), key=lambda item: -len(item[0]))  # one may begin with another
        self.session: Session | None = None
        self.transcript: Transcript | None = None
        self.counts = {"tool_calls": 0, "tool_errors": 0}
        self.paid: list[float] = []

    async def reset(self, prompt: Prompt) -> Observation:
        """Raises DataError when the row names no task, or the environment shows an image."""
        task, variant = task_of(prompt)
        self.session = connection(self.options.base_url).session(task, variant, self.secrets)
        await self._ask(self.session.open())
        sdk = self.session.sdk
        asked, specs = await self._ask(asyncio.gather(sdk.get_messages(), sdk.list_tools()))
        messages = [self._shown(message) for message in convert_messages(asked, "openai")]
        tools = tuple(self._hide_in(tool_schema(spec)) for spec in specs)
        if (template := self.options.system_prompt_template) is not None:
            messages = with_system(system_prompt(template, listed(tools)), messages)
            tools = ()
        self._begin_transcript(prompt, task, variant, messages)
        return Observation(tuple(messages), tools)

    async def step(self, action: Action) -> StepResult:
        if self.transcript is not None:
            self.transcript.said(action)
        if action.finish_reason == "length":
            return StepResult(done=True, info=self._info())
        calls = action.tool_calls or parse_hermes(action.text).tool_calls  # a system prompt may have asked for this
        if not calls:
            return await self._answer(action.text)
        messages: list[Message] = []
        paid: list[float] = []
        finished = False
        for call in calls:
            text, reward, finished = await self._call(call)
            messages.append({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text})
            paid += [] if reward is None else [reward]
            self._note(messages[-1], reward, finished)
            if finished:
                break
        self.paid += paid
        return StepResult(tuple(messages), sum(paid) if paid else None, finished, self._info())

    async def close(self) -> None:
        session, self.session = self.session, None
        transcript, self.transcript = self.transcript, None
        try:
            if session is not None:
                await self._ask(session.close())
        finally:
            if transcript is not None and transcript.turns:
                uploader().put(transcript)

    # ------------------------------------------------------------------------------------------------------- speaking

    async def _answer(self, text: str) -> StepResult:
        """A turn that calls nothing."""
        sdk = self._open.sdk
        if not await self._ask(sdk.is_assistant_message_final()):
            return self._told(NO_CALL)
        try:
            output = await self._ask(sdk.call_terminal_tool(encodable(text)))
        except ToolCallError as error:
            self.counts["tool_errors"] += 1
            return self._told(f"Error: {self._hide(error.detail)}")
        return self._told(self._text(output), output.reward, done=True)

    def _told(self, text: str, reward: float | None = None, done: bool = False) -> StepResult:
        """What the model hears of a turn that called nothing."""
        message: Message = {"role": "user", "content": text}
        self._note(message, reward, done)
        self.paid += [] if reward is None else [reward]
        return StepResult((message,), reward, done, self._info())

    async def _call(self, call: ToolCall) -> tuple[str, float | None, bool]:
        """What the tool said, what it paid, and whether it ended the episode."""
        self.counts["tool_calls"] += 1
        try:
            if call.error:
                raise ValueError(call.error)
            arguments = json.loads(encodable(json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)))
            output = await self._ask(self._open.sdk.call_tool(encodable(call.name), arguments))
        except (ToolCallError, ValueError) as error:
            self.counts["tool_errors"] += 1
            detail = error.detail if isinstance(error, ToolCallError) else str(error)
            return f"Error: {self._hide(detail)}", None, False
        return self._text(output), output.reward, output.finished

    async def _ask(self, request: Awaitable[T]) -> T:
        """Raises SessionError for whatever goes wrong but the model's own mistakes."""
        try:
            return await request
        except ToolCallError:
            raise
        except Exception as error:  # its text, and the requests that it may hold, can have secrets in them
            raise SessionError(self._hide(f"{type(error).__name__}: {error}")) from None

    @property
    def _open(self) -> Session:
        if self.session is None:
            raise SessionError("no session is open: `reset` comes first")
        return self.session

    # -------------------------------------------------------------------------------------------------- what was said

    def _info(self) -> dict[str, Any]:
        """Counts, and what each call of the trajectory was paid: the reward reduces these, not the sums of turns."""
        return {**self.counts, PAID: list(self.paid)}

    def _shown(self, message: dict[str, Any]) -> Message:
        content = message.get("content")
        text = content if isinstance(content, str) else joined(part.get("text") for part in content or ())
        shown: Message = self._hide_in({**message, "content": text})  # reasoning and calls, too
        return shown

    def _text(self, output: ToolOutput) -> str:
        return self._hide(joined(getattr(block, "text", None) for block in output.blocks))

    def _hide(self, text: str) -> str:
        for spelling, name in self._struck_out:
            text = text.replace(spelling, f"[{name}]")
        return text

    def _hide_in(self, value: Any) -> Any:
        """Something that was JSON, with all its texts and keys as `_hide` leaves them."""
        if isinstance(value, dict):
            return {self._hide(key): self._hide_in(held) for key, held in value.items()}
        if isinstance(value, list):
            return [self._hide_in(held) for held in value]
        return self._hide(value) if isinstance(value, str) else value

    def _note(self, message: Message, reward: float | None, finished: bool) -> None:
        if self.transcript is not None:
            self.transcript.answered(message, reward, finished)

    def _begin_transcript(self, prompt: Prompt, task: Task, variant: str | None, messages: Sequence[Message]) -> None:
        if self.options.run_name is None:
            return
        rollout = {
            "run_name": self.options.run_name,
            "environment": task.deployment_name,
            "variant": variant,
            "split": prompt.metadata.get("split"),
            "task_spec": dict(task.task_spec),
        }
        self.transcript = Transcript(rollout, prompt.metadata.get("index"))
        self.transcript.asked(tuple(messages))


def task_of(prompt: Prompt) -> tuple[Task, str | None]:
    """Task and variant. Raises DataError when the row does not name them."""
    row = prompt.metadata
    if missing := [key for key in TASK if key not in row]:
        raise DataError(
            f"{prompt.id} names no OpenReward task: its metadata has no {', '.join(missing)}. Rows are written by "
            "`python -m miles_openreward.prepare_tasks`"
        )
    return Task(**{key: row[key] for key in TASK}), row.get("variant")


def spellings(text: str) -> set[str]:
    """As it stands, and as errors quote it: as Python and JSON write strings, with and without other than ASCII."""
    quoted = (repr(text), ascii(text), json.dumps(text), json.dumps(text, ensure_ascii=False))
    return {text, *(one[1:-1] for one in quoted)}


def tool_schema(spec: ToolSpec) -> dict[str, Any]:
    """As OpenAI has it; a tool without arguments takes an empty object."""
    parameters = sanitize_tool_schema(spec.input_schema, "anthropic") or {"type": "object", "properties": {}}
    function = {"name": spec.name, "description": spec.description, "parameters": parameters}
    return {"type": "function", "function": function}


def listed(tools: Iterable[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)


def with_system(system: str, messages: list[Message]) -> list[Message]:
    """A system message in front, or before what the environment's own one says: templates take one."""
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def joined(texts: Iterable[str | None]) -> str:
    """Raises DataError when one is None: it was an image."""
    said = list(texts)
    if None in said:
        raise DataError("the environment shows an image, and no chat format of this version takes one")
    return "\n".join(text for text in said if text is not None)


def encodable(text: str) -> str:
    """Half a surrogate pair, which a tokenizer may produce, is no text to a server."""
    return text.encode("utf-8", "replace").decode("utf-8")
