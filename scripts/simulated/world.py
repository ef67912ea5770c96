"""What a simulated model talks to: a chat format of fixed lengths, and an environment whose tools take their time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulated.engine import END

from miles.api import Action, ChatContext, Message, Observation, Prompt, StepResult

QUESTION, TOOL = 2, 3
"""Tokens of prompts, and of what tools answer."""
PROMPT_TOKENS, TOOL_TOKENS = 200, 50


class FixedChat:
    """Every prompt has 200 tokens, every answer of a tool 50; what the model says is the number that it repeats."""

    stop_token_ids = (END,)
    end_of_turn_id = END

    def __init__(self, *, context: ChatContext | None = None):
        """It needs no tokenizer."""

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        return [QUESTION] * PROMPT_TOKENS

    def render_text(self, text: str) -> list[int]:
        return [QUESTION] * PROMPT_TOKENS

    def render_next(self, messages: Sequence[Message], closed: bool = True) -> list[int]:
        return [TOOL] * TOOL_TOKENS if closed else [END] + [TOOL] * TOOL_TOKENS

    def render_conversation(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        return self.render_prompt(messages), [0] * PROMPT_TOKENS

    def parse(self, tokens: Sequence[int], finish_reason: str = "stop") -> Action:
        return Action(self.decode(tokens[:1]), finish_reason=finish_reason)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(tokens[0]) if tokens else ""


@dataclass
class ToolOptions:
    median: float = 4.0
    """Seconds of a tool: log-normal with this median."""
    sigma: float = 1.0
    last: float = 0.3
    """Chance that a turn is the last one."""


class SlowTools:
    """Runs a tool after every turn. How long it takes, and whether that was all, follows from what was said."""

    def __init__(self, options: ToolOptions):
        self.options = options
        self.seconds = 0.0

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(tuple(prompt.messages or ()))

    async def step(self, action: Action) -> StepResult:
        draw = random.Random(f"tool {action.text}")
        seconds = draw.lognormvariate(0, self.options.sigma) * self.options.median
        await asyncio.sleep(seconds)
        self.seconds += seconds
        done = draw.random() < self.options.last
        reward = float(draw.random() < 0.5) if done else None
        said: tuple[Message, ...] = ({"role": "tool", "content": "done"},)
        return StepResult(said, reward, done, {"tool_seconds": self.seconds})

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]

    async def close(self) -> None:
        """Nothing is open."""


@dataclass
class EchoOptions:
    turns: int = 10
    most: int = 64
    """Characters that are repeated."""


class Echo:
    """Says what was said to it, a number of times."""

    def __init__(self, options: EchoOptions):
        self.options, self.taken = options, 0

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(tuple(prompt.messages or ()))

    async def step(self, action: Action) -> StepResult:
        self.taken += 1
        said: tuple[Message, ...] = ({"role": "user", "content": action.text[: self.options.most]},)
        done = self.taken == self.options.turns
        return StepResult(said, float(len(action.text) % 2) if done else None, done)

    async def close(self) -> None:
        """Nothing is open."""
