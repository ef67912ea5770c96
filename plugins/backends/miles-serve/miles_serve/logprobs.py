"""Log-probabilities as OpenAI's two APIs write them: one entry for every token, that of the end included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles_serve.vocabulary import TextStream, Vocabulary

LEAST = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def chat_logprobs(
    vocabulary: Vocabulary, tokens: Sequence[int], log_probs: Sequence[float], as_ids: bool = False
) -> dict[str, Any]:
    """`choices[i].logprobs` of a chat completion."""
    content = [
        {
            "token": _name(vocabulary, token, as_ids),
            "bytes": list(vocabulary.bytes_of(token)),
            "logprob": max(log_prob, LEAST),
            "top_logprobs": [],
        }
        for token, log_prob in zip(tokens, log_probs, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[i].logprobs` of a text completion, which also says where in the text each token begins."""

    def __init__(self, vocabulary: Vocabulary, as_ids: bool = False):
        self.vocabulary, self.as_ids = vocabulary, as_ids
        self._text = TextStream(vocabulary, special=False)
        self._length = 0

    def of(self, tokens: Sequence[int], log_probs: Sequence[float | None]) -> dict[str, Any]:
        """Of the next tokens. The first one of a prompt has no log-probability: None."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._text.feed([token]))
        return {
            "tokens": [_name(self.vocabulary, token, self.as_ids) for token in tokens],
            "token_logprobs": [None if value is None else max(value, LEAST) for value in log_probs],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def _name(vocabulary: Vocabulary, token: int, as_id: bool) -> str:
    return f"token_id:{token}" if as_id else vocabulary.text_of(token)
