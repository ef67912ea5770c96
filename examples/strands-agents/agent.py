"""A strands agent that may multiply with a tool: nothing in it knows that it is being trained, but for its base_url."""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from typing import Any

from openai import AsyncOpenAI
from strands import Agent, tool
from strands.models.openai import OpenAIModel
from strands.types.exceptions import MaxTokensReachedException

SYSTEM = "Answer the question."
MOST_TURNS = 4


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a * b


@lru_cache(maxsize=1)
def connections(loop: asyncio.AbstractEventLoop) -> AsyncOpenAI:
    """One pool for all agents of a run: a client for each request would read the machine's certificates each time."""
    return AsyncOpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=0)


async def answer(base_url: str, prompt: Any, request_kwargs: dict[str, Any], label: str, **_: Any) -> dict[str, float]:
    """Let an agent answer one question; it is worth 1 when the only number that it says is the right one."""
    client = connections(asyncio.get_running_loop()).with_options(base_url=base_url)
    model = OpenAIModel(client, model_id="policy", params=request_kwargs)
    agent = Agent(model=model, tools=[multiply], system_prompt=SYSTEM, callback_handler=None)
    try:
        said = await agent.invoke_async(prompt, limits={"turns": MOST_TURNS})
    except MaxTokensReachedException:  # strands raises it when a turn hits its length limit
        return {"reward": 0.0}
    return {"reward": float(re.findall(r"\d+", str(said)) == [label])}
