"""What SGLang's API says of an answer: its text, its tokens and `meta_info`, whole or piece by piece."""

from __future__ import annotations

import base64
import time
from typing import Any, Protocol

import numpy as np

from miles.api import GenerateResult, expert_choices
from miles_serve.asked import Wanted
from miles_serve.reading import StopCut, first_of
from miles_serve.vocabulary import TextStream, Vocabulary

LogProb = tuple[float | None, int, str | None]
"""As SGLang writes it: log-prob, token, and the token's text if it was asked for."""


class Speaker(Protocol):
    """What replies say of who gives them, and need to be written."""

    @property
    def model(self) -> str:
        """The name under which clients know it."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def pieces(self) -> Vocabulary: ...

    @property
    def version(self) -> int:
        """Of the weights, where an answer does not tell."""

    def label(self, version: int | None = None) -> str:
        """What clients call a version of the weights."""


class Reply:
    """One answer while it arrives."""

    def __init__(self, service: Speaker, wanted: Wanted):
        self.service, self.wanted = service, wanted
        self.begun = time.perf_counter()
        self.prompt_log_probs: list[LogProb] = []
        self.prompt_top: list[list[LogProb] | None] | None = None
        self.candidates: list[LogProb] = []
        self.finished: dict[str, Any] | None = None if wanted.generates else {"type": "length", "length": 0}
        """SGLang's `finish_reason`, once there is one."""
        self._tokens: list[int] = []
        self._log_probs: list[LogProb] = []
        self._version, self._cached = service.version, 0
        self._experts: np.ndarray | None = None
        self._text, self._texts = "", TextStream(service.pieces, special=not wanted.sampling.skips_special)
        self._cut = StopCut(wanted.request.sampling.stop if wanted.sampling.trims_stops else ())
        self._held: list[int] = []
        """A stop token, of which it is not known yet whether it ended the answer."""
        self._told = (0, 0)
        """Characters and tokens that a piece of a stream has told of."""

    def score(self, log_probs_T: np.ndarray) -> None:
        """Take in what the engine says of the prompt. Nothing predicts the first token that is told of: SGLang says
        nothing of it, wherever that is."""
        start = self.wanted.score_from
        tokens = self.wanted.request.tokens[start:]
        values = [None, *(float(value) for value in log_probs_T[start + 1 :])]
        self.prompt_log_probs = [self._log_prob(v, token) for v, token in zip(values, tokens, strict=True)]

    def score_top(self, ids_TK: np.ndarray, log_probs_TK: np.ndarray) -> None:
        start = self.wanted.score_from + 1
        rows = zip(log_probs_TK[start:].tolist(), ids_TK[start:].tolist(), strict=True)
        self.prompt_top = [None, *([self._log_prob(*pair) for pair in zip(*row, strict=True)] for row in rows)]

    def score_candidate(self, token: int, log_prob: float) -> None:
        self.candidates.append(self._log_prob(log_prob, token))

    def add(self, piece: GenerateResult) -> None:
        """Take in what was generated: a piece of a stream, or everything at once."""
        self._tokens += piece.tokens
        self._log_probs += [self._log_prob(*pair) for pair in zip(piece.log_probs, piece.tokens, strict=True)]
        self._version = piece.weight_versions[-1] if piece.weight_versions else self._version
        self._cached = piece.cached_tokens
        self._experts = piece.routed_experts
        if piece.finish_reason:
            self.finished = self._finish_reason(piece.finish_reason)
        self._write(piece.tokens)

    def abort(self) -> None:
        """It ends with what it has."""
        self.finished = self._finish_reason("abort")

    def whole(self) -> dict[str, Any]:
        """Everything so far."""
        return self._reply(0, 0)

    def news(self) -> dict[str, Any]:
        """What came since this was last asked."""
        characters, tokens = self._told
        self._told = len(self._text), len(self._tokens)
        return self._reply(characters, tokens)

    # --------------------------------------------------------------------------------------------------------- pieces

    def _write(self, tokens: list[int]) -> None:
        """Text of what is certain. A stop token is no text if it ends the answer."""
        tokens, self._held = [*self._held, *tokens], []
        ends = self.wanted.sampling.trims_stops and tokens and tokens[-1] in self.wanted.request.sampling.stop_token_ids
        if ends and (self.finished is None or self.finished.get("matched") == tokens[-1]):
            self._held = [tokens.pop()]
        self._text += self._cut.feed(self._texts.feed(tokens))
        if self.finished is not None:
            self._text += self._cut.feed(self._texts.close()) + self._cut.close()

    def _finish_reason(self, reason: str) -> dict[str, Any]:
        if reason == "abort":
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        if reason == "length":
            return {"type": "length", "length": len(self._tokens)}
        sampling = self.wanted.request.sampling
        if self._tokens and self._tokens[-1] in sampling.stop_token_ids:
            return {"type": "stop", "matched": self._tokens[-1]}
        text = self.service.tokenizer.decode(self._tokens, clean_up_tokenization_spaces=False)
        found = first_of(sampling.stop, text)
        return {"type": "stop", "matched": found[1] if found else None}

    def _reply(self, characters: int, tokens: int) -> dict[str, Any]:
        """Without the text and the tokens that came before these."""
        wanted = self.wanted
        reply: dict[str, Any] = {"text": self._text[characters:], "output_ids": self._tokens[tokens:]}
        if wanted.prompt_ids:
            reply["prompt_token_ids"] = wanted.request.tokens
        return reply | {"meta_info": self._meta_info(tokens)}

    def _meta_info(self, since: int) -> dict[str, Any]:
        wanted = self.wanted
        meta: dict[str, Any] = {
            "id": wanted.request.id,
            "finish_reason": self.finished,
            "prompt_tokens": len(wanted.request.tokens),
            "weight_version": self.service.label(self._version),
            "num_retractions": 0,
        }
        if wanted.log_probs:
            meta["input_token_logprobs"] = self.prompt_log_probs
            meta["output_token_logprobs"] = self._log_probs[since:]
            meta["output_token_logprobs_length"] = len(self._log_probs)
            if self.candidates:
                meta["output_token_ids_logprobs"] = [self.candidates]
            if self.prompt_top is not None:
                meta["input_top_logprobs"] = self.prompt_top
            if wanted.score_temperature is not None:
                meta["input_logprob_temperature"] = wanted.score_temperature
        if wanted.sampling_log_probs:
            meta["output_token_sampling_logprobs"] = [value for value, *_ in self._log_probs[since:]]
        meta |= {
            "reasoning_tokens": 0,
            "completion_tokens": len(self._tokens),
            "cached_tokens": self._cached,
            "cached_tokens_details": None,
            "dp_rank": None,
        }
        if self._experts is not None:
            meta["routed_experts"] = self._encoded(self._experts)
        if self.finished is not None:
            meta["e2e_latency"] = time.perf_counter() - self.begun
        return meta

    def _encoded(self, experts: np.ndarray) -> str:
        """base64 of int32 `[rows, layers, top_k]`: the rows from `routed_experts_start_len` on."""
        request = self.wanted.request
        rows = len(request.tokens) + len(self._tokens) - 1 - request.routed_experts_from
        choices = expert_choices(experts[len(experts) - rows :]).astype("<i4", copy=False)
        return base64.b64encode(choices.tobytes()).decode()

    def _log_prob(self, value: float | None, token: int) -> LogProb:
        return value, token, self.service.pieces.text_of(token) if self.wanted.text_in_log_probs else None
