"""Agents that tests write, in sessions in front of engines that play a part."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import numpy as np
import openai
import pytest

from miles.api import (
    GenerateContext,
    GenerateRequest,
    GenerateResult,
    Prompt,
    Sample,
    SamplingParams,
    routed_experts_column,
)
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

ASK = [{"role": "user", "content": "hello"}]
MODULE = "agents_of_a_test"
ID, SEED = 5, 99


class Lines:
    """An engine that says line after line, `(text, finish reason)`, the last one again and again. `stop` ends with the
    end of a turn, `weights` is an abort that makes way for new ones, an exception is raised. It notes who asked what,
    and everything that it produced."""

    def __init__(self, *lines: Any, chat: Any = None):
        self.chat = chat or tiny.chat_format(installed())
        self.lines = [line if isinstance(line, tuple) else (line, "stop") for line in lines or ("hello you",)]
        self.requests: list[GenerateRequest] = []
        self.streams: list[list[int]] = []
        """Of each request, its tokens and what was said."""
        self.produced = 0

    async def __call__(self, request: GenerateRequest) -> GenerateResult:
        text, reason = self.lines[min(len(self.requests), len(self.lines) - 1)]
        self.requests.append(request)
        await asyncio.sleep(0)
        if isinstance(text, Exception):
            raise text
        tokens = self.chat.render_text(text)
        if reason == "stop" and not any(stop in text for stop in request.sampling.stop):
            tokens = [*tokens, self.chat.stop_token_ids[0]]
        if len(tokens) > request.sampling.max_new_tokens:
            tokens, reason = tokens[: request.sampling.max_new_tokens], "length"
        log_probs = [-0.001 * (1 + self.produced + i) for i in range(len(tokens))]
        self.produced += len(tokens)
        self.streams.append([*request.tokens, *tokens])
        changing, experts = reason == "weights", self._experts(request, tokens)
        reason = "abort" if changing else reason
        return GenerateResult(tokens, log_probs, reason, [3] * len(tokens), experts, interrupted=changing)

    def _experts(self, request: GenerateRequest, tokens: list[int]) -> np.ndarray | None:
        """Each row says of which token it is, as `Sample.tokens` will have it, and is compact."""
        if not request.routed_experts:
            return None
        known = [*request.tokens, *tokens]
        rows = np.array(known[request.routed_experts_from : -1]) % 250
        return rows.astype(routed_experts_column(1, 1, 255).dtype).reshape(-1, 1, 1)


class Lab:
    """Runs agents."""

    Lines = Lines

    def build(self, agent: Any, **options: Any) -> Any:
        """The generate function with this agent."""
        module = sys.modules.setdefault(MODULE, ModuleType(MODULE))
        name = f"agent_{len(vars(module))}"
        setattr(module, name, agent)
        spec = Spec(name="agent", options={"function": f"{MODULE}:{name}", **options})
        return installed().build("generate_functions", spec)

    def context(self, engine: Any, **changes: Any) -> GenerateContext:
        sampling = SamplingParams(max_new_tokens=64, stop_token_ids=tuple(engine.chat.stop_token_ids))
        return GenerateContext(**{"generate": engine, "chat": engine.chat, "sampling": sampling, **changes})

    def sample(self, engine: Any, messages: Any = ASK, **changes: Any) -> Sample:
        tokens = engine.chat.render_prompt(messages)
        given = {"messages": messages, "tokens": tokens, **changes}
        return Sample.begin(Prompt("set:0", "set", **given), id=ID, group_id=1, seed=SEED)

    def run(
        self, agent: Any, engine: Any = None, options: Any = None, prompt: Any = None, **context: Any
    ) -> list[Sample]:
        """The samples that come of one agent."""
        engine = engine or Lines()
        function = self.build(agent, **(options or {}))
        sample = self.sample(engine, **(prompt or {}))
        result = asyncio.run(function(self.context(engine, **context), sample))
        return result if isinstance(result, list) else [result]


def client(base_url: str, **changes: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, **{"api_key": "none", "max_retries": 0, "timeout": 30, **changes})


async def ask(base_url: str, messages: Any, **params: Any) -> Any:
    """One request of an unmodified client: its whole reply."""
    async with client(base_url) as asking:
        return await asking.chat.completions.create(model="any", messages=messages, **params)


async def say(base_url: str, messages: list[Any], **params: Any) -> str:
    """The same, and the answer joins the conversation."""
    message = (await ask(base_url, messages, **params)).choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    return message.content or ""


@pytest.fixture(scope="session")
def lab() -> Any:
    lab = Lab()
    lab.ask, lab.say, lab.client, lab.messages = ask, say, client, ASK  # type: ignore[attr-defined]
    return lab
