"""Data source `files`: prompts from JSONL, Parquet and hub data sets, drawn in an order that can be repeated.

Each task set has an order of its own, a permutation that follows from (seed, set, epoch) alone, and a position in it.
Sets take turns by weight: the next prompt comes from the set that is furthest behind its share. So the whole sequence
is a function of the seed, and three numbers a set are enough to go on from any point of it.

A prompt is rendered to tokens when it is first drawn, and the tokens are kept for later epochs.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from miles.api import ChatFormat, ConfigError, DataContext, DataError, Prompt
from miles.toolkit import TaskSet, screen

CACHED_TOKENS = 64 * 1024**2
"""Tokens of rendered prompts that one set keeps at most (4 bytes each)."""


class FileSource:
    """Draws from all task sets of its context. `counts` holds what was dropped since the start of the run.

    Raises:
        DataError: a set has no file, an unreadable one, or no usable row.
    """

    def __init__(self, *, context: DataContext):
        names = [task_set.name for task_set in context.sets]
        if not names:
            raise ConfigError("no prompts: give --prompt-data FILE or data.sets")
        if len(set(names)) < len(names):
            raise ConfigError(f"data.sets: names must be unique, got {', '.join(names)}")
        self.sets = [TaskSetRows(task_set, context) for task_set in context.sets]
        weights = [task_set.weight for task_set in context.sets]
        self._shares = [weight / sum(weights) for weight in weights]

    def __len__(self) -> int:
        """Rows of all sets; prompts that are too long are found, and dropped, only when drawn."""
        return sum(len(rows) for rows in self.sets)

    @property
    def counts(self) -> dict[str, int]:
        return {
            "too_long": sum(rows.too_long for rows in self.sets),
            "bad_rows": sum(rows.screened + rows.skipped for rows in self.sets),
        }

    def next_prompts(self, count: int) -> list[Prompt]:
        return [self._furthest_behind().next_prompt() for _ in range(count)]

    def every_prompt(self) -> list[Prompt]:
        """Every usable prompt once, in the order of sets and rows, whatever was drawn before: for evaluation."""
        return [prompt for rows in self.sets for prompt in rows.every_prompt()]

    def _furthest_behind(self) -> TaskSetRows:
        following = sum(rows.drawn for rows in self.sets) + 1
        deficits = [share * following - rows.drawn for rows, share in zip(self.sets, self._shares, strict=True)]
        return self.sets[deficits.index(max(deficits))]

    def state_dict(self) -> dict[str, Any]:
        return {rows.name: rows.state_dict() for rows in self.sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = {rows.name for rows in self.sets}
        if names != set(state):
            raise DataError(
                f"the checkpoint was drawing from the task sets {', '.join(sorted(state))}, the config names "
                f"{', '.join(sorted(names))}; resume with the same data.sets, or start anew with --resume never"
            )
        for rows in self.sets:
            rows.load_state_dict(state[rows.name])


class TaskSetRows:
    """The rows of one task set, and how far they were drawn."""

    def __init__(self, task_set: TaskSet, context: DataContext):
        self.task_set, self.context, self.name = task_set, context, task_set.name
        self.skip = context.bad_lines == "skip"
        found = screen(task_set, self.skip)
        self.rows, self.usable, self.screened, self._read = found.rows, found.usable, found.malformed, found.read
        self.skipped = self.too_long = 0
        self.epoch = self.position = self.drawn = 0
        self._order: tuple[int, Any] = (-1, None)
        self._tokens: dict[int, array] = {}
        self._tokens_kept = 0

    def __len__(self) -> int:
        return len(self.usable)

    # -------------------------------------------------------------------------------------------------------- drawing

    def next_prompt(self) -> Prompt:
        """The next prompt of the order that can be used."""
        for _ in range(len(self.usable)):
            if self.position == len(self.usable):
                self.epoch, self.position = self.epoch + 1, 0
            self.position += 1
            prompt = self._usable_prompt(self._ordered(self.position - 1))
            if prompt is not None:
                self.drawn += 1
                return prompt
        raise DataError(
            f"task set {self.name!r}: none of the {len(self.usable)} prompts of {self.task_set.path} can be used: each "
            f"is malformed{self._limit()}"
        )

    def _limit(self) -> str:
        """What prompts may not be longer than, and where that comes from."""
        limit = self.context.max_prompt_tokens
        if limit is None:
            return ""
        return (
            f" or longer than {limit} tokens. That is data.max_prompt_len (--rollout-max-prompt-len) where it is set, "
            "and at most what the context of the model (or rollout.max_context_len) leaves for a prompt and one token "
            "of response"
        )

    def every_prompt(self) -> list[Prompt]:
        prompts = (self._usable_prompt(index) for index in self.usable)
        return [prompt for prompt in prompts if prompt is not None]

    def _ordered(self, position: int) -> int:
        if not self.context.shuffle:
            return self.usable[position]
        epoch, order = self._order
        if epoch != self.epoch:
            entropy = [self.context.seed & (2**64 - 1), zlib.crc32(self.name.encode()), self.epoch]
            order = np.random.Generator(np.random.PCG64(entropy)).permutation(len(self.usable))
            self._order = (self.epoch, order)
        return self.usable[int(order[position])]

    def _usable_prompt(self, index: int) -> Prompt | None:
        """The prompt of a row with its tokens, or None when it is dropped; what is dropped is counted."""
        try:
            prompt = self._read(index)
        except DataError:
            if not self.skip:
                raise
            self.skipped += 1
            return None
        prompt.tokens = self._rendered(index, prompt)
        limit = self.context.max_prompt_tokens
        if limit is not None and len(prompt.tokens) > limit:
            self.too_long += 1
            return None
        return prompt

    def _rendered(self, index: int, prompt: Prompt) -> list[int]:
        known = self._tokens.get(index)
        if known is None:
            try:
                known = array("i", render(prompt, self.context.chat))
            except DataError as error:
                raise DataError(f"{self.rows.where(index)}: {error}") from error
            if self._tokens_kept + len(known) <= CACHED_TOKENS:
                self._tokens[index] = known
                self._tokens_kept += len(known)
        return known.tolist()

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, int]:
        fields = ("epoch", "position", "drawn", "too_long", "skipped")
        return {"rows": len(self.usable), **{field: getattr(self, field) for field in fields}}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["rows"] != len(self.usable):
            raise DataError(
                f"task set {self.name!r}: the checkpoint was drawing from {state['rows']} rows, {self.task_set.path} "
                f"now has {len(self.usable)}; restore the file, or start anew with --resume never"
            )
        for field in ("epoch", "position", "drawn", "too_long", "skipped"):
            setattr(self, field, int(state[field]))


def render(prompt: Prompt, chat: ChatFormat) -> list[int]:
    """Tokens of a prompt: empty when the assistant has spoken last or an environment shall say what is asked.

    Raises:
        DataError: the prompt has images.
    """
    if prompt.images:
        raise DataError(
            "the prompt has images, and no chat format of this version makes tokens of them: leave keys.images "
            "(--image-key) out to train on the text alone"
        )
    if prompt.text is not None:
        return chat.render_text(prompt.text)
    if not prompt.messages or prompt.messages[-1]["role"] == "assistant":
        return []
    return chat.render_prompt(prompt.messages, prompt.tools)
