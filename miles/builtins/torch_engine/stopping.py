"""When a response ends: at a stop token, or once the text of its last tokens completes a stop string.

Looking at text for every token of every request would cost more than the model. So each stop string is turned into the
set of tokens that can complete it (their text contains its last character); only when one of these is drawn is text
decoded, and only of as many tokens as the string can span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from miles.api import EngineError, SamplingParams
from miles.builtins.torch_engine.prefix_cache import common_prefix

_UNFINISHED = "�"
"""What a tokenizer decodes a part of a character to."""


class StopStrings:
    """Knows a tokenizer's vocabulary as text."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._texts: list[str] | None = None
        self._completing: dict[str, np.ndarray] = {}

    def check(self, stop: str) -> None:
        """Raises EngineError for a string that nothing can be told about."""
        if not stop or self.tokenizer is None:
            problem = "an empty stop string" if not stop else f"stop string {stop!r}, but there is no tokenizer"
            raise EngineError(f"torch engine: {problem}; give stop_token_ids instead")

    def completing(self, stop: str) -> np.ndarray:
        """Which tokens can be the last of this string, `[V]` bool."""
        if stop not in self._completing:
            if self._texts is None:
                self._texts = self._decode_all()
            found = [stop[-1] in text or _UNFINISHED in text or not text for text in self._texts]
            self._completing[stop] = np.array(found)
        return self._completing[stop]

    def completed(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the last of these (generated) tokens completes one of the strings."""
        return any(self._completes(tokens, stop) for stop in stops if self.completing(stop)[tokens[-1]])

    def _completes(self, tokens: Sequence[int], stop: str) -> bool:
        # A token may be a quarter of a character, so a string of n characters spans at most 4 n tokens.
        tail = list(tokens[-4 * len(stop) - 1 :])
        after = self._decode(tail)
        before = self._decode(tail[:-1])
        unchanged = common_prefix(before, after)
        found = after.rfind(stop)
        return found >= 0 and found + len(stop) > unchanged

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _decode_all(self) -> list[str]:
        """Text of every token as it reads after another one: some tokenizers drop a space at the start."""
        lead = self.tokenizer.encode("a", add_special_tokens=False)
        start = len(self._decode(lead))
        known = min(len(self.tokenizer), self.vocab_size)
        return [self._decode([*lead, i])[start:] for i in range(known)] + [""] * (self.vocab_size - known)


class StopWatch:
    """Which tokens need a closer look, given the requests that are running."""

    def __init__(self, strings: StopStrings):
        self.strings = strings
        self.watched_V = np.zeros(strings.vocab_size, bool)
        self._wanted: frozenset[tuple[tuple[str, ...], tuple[int, ...]]] = frozenset()

    def attend(self, params: Sequence[SamplingParams]) -> None:
        """To be called when the running requests change."""
        wanted = frozenset((p.stop, p.stop_token_ids) for p in params)
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self.watched_V[:] = False
        for stops, ids in wanted:
            self.watched_V[[i for i in ids if i < len(self.watched_V)]] = True
            for stop in stops:
                self.watched_V |= self.strings.completing(stop)

    def stops(self, generated: Sequence[int], params: SamplingParams) -> bool:
        """Whether the last generated token ends this response."""
        return generated[-1] in params.stop_token_ids or (
            bool(params.stop) and self.strings.completed(generated, params.stop)
        )
