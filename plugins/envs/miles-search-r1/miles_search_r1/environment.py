"""Environment `search_r1`: the model searches as often as it likes, then answers.

A turn ends with a query, whose result stands behind it in the same turn of the conversation, or with the answer, which
ends the episode. What the answer is worth is for the reward `search_r1` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from miles.api import Action, EnvironmentLimits, Observation, Prompt, StepResult
from miles_search_r1.backends import BACKENDS
from miles_search_r1.connections import SearchError, SearchRefused, pauses
from miles_search_r1.notation import STOP, information, plain, read_move
from miles_search_r1.plugin import SearchOptions
from miles_search_r1.reward import targets_in

GRACE = 30.0
"""Seconds that a step may take beyond all attempts of its search."""
logger = logging.getLogger("miles")


class SearchR1:
    """One trajectory. Connections are shared with all others, and closed with the last."""

    stop = STOP

    def __init__(self, options: SearchOptions):
        self.options = options
        request = options.timeout * (options.retries + 1) + sum(pauses(options.retries))
        self.limits = EnvironmentLimits(calls=options.concurrency, step_timeout=request + GRACE)
        self.counts = {"searches": 0, "search_errors": 0, "invalid_actions": 0}
        self._search = BACKENDS[options.backend](options)

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(())

    async def step(self, action: Action) -> StepResult:
        """Raises SearchError when a search failed and `on_failure` is `fail`."""
        move = read_move(action)
        if move is not None and move.kind == "answer":
            return StepResult(done=True, info=dict(self.counts))
        if action.finish_reason == "length":
            return StepResult(done=True, info=dict(self.counts))  # nobody would read the answer
        if move is None:
            self.counts["invalid_actions"] += 1
            return self._tell(self.options.invalid_action_message)
        return self._tell(await self._found(plain(move.text)))

    async def close(self) -> None:
        await self._search.close()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = dict(state)

    def script(self, prompt: Prompt) -> Iterator[Action | str]:
        """Who knows the answer asks the question as it stands, and then gives it."""
        yield f"<think>I look it up.</think><search>{question_of(prompt)}</search>"
        yield f"<think>I know it now.</think><answer>{targets_in(prompt)[0]}</answer>"

    def _tell(self, text: str) -> StepResult:
        return StepResult(({"role": "user", "content": text},), info=dict(self.counts), inline=True)

    async def _found(self, query: str) -> str:
        self.counts["searches"] += 1
        try:
            documents = await self._search(query) if query else []
        except SearchError as error:
            self.counts["search_errors"] += 1
            if self.options.on_failure == "fail" and not isinstance(error, SearchRefused):
                raise
            logger.debug("search_r1: %s", error)
            return "\n\n<information>The search failed.</information>\n\n"
        return information(documents, self.options.max_result_length)


def question_of(prompt: Prompt) -> str:
    """The end of what was asked: the last line of the last message, without `Question:`."""
    text = prompt.text if prompt.text is not None else str((prompt.messages or [{}])[-1].get("content", ""))
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].rpartition("Question:")[2].strip() if lines else ""
