"""What SGLang answers to `/generate`: read, checked, and put together where it comes in pieces."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from miles.api import EngineError, GenerateRequest, GenerateResult, Routing, compact_experts
from miles_sglang.client import QUOTED, MalformedError

REASONS = {None: "", "stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True)
class Piece:
    """What one reply brought, or one chunk of a stream: part of an answer, all of it when nothing interrupted."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    version: int = 0
    """Of all its tokens: a reply carries one, that of its end. -1 where the server says no number."""
    finish_reason: str = ""
    """Empty in a chunk of a stream that goes on."""
    experts: str | None = None
    """base64 of int32 `[rows, layers, top_k]`."""
    cached_tokens: int = 0
    prompt_log_probs: list[float] = field(default_factory=list)
    """`[T]`, 0 at position 0, when they were asked for."""
    next_log_prob: float | None = None
    """Of the one token that was asked about as the first of the answer."""


@dataclass(frozen=True)
class Reader:
    """Reads replies to one request under one id."""

    rid: str
    vocabulary: int
    truncates: bool = False
    """Log-probabilities are to be those of the truncated distribution that was sampled from."""

    def read(self, reply: Any, first: bool = True) -> Piece:
        """`first`: nothing of this answer has come before.

        Raises:
            MalformedError: it is no answer to this request.
            EngineError: the model is damaged, or the server cannot say what was asked for.
        """
        try:
            return self._read(reply, first)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedError(f"SGLang sent a malformed answer ({error!r}): {str(reply)[:QUOTED]}") from error

    def _read(self, reply: Any, first: bool) -> Piece:
        if "error" in reply and "meta_info" not in reply:
            raise EngineError(f"SGLang refused the request: {reply['error']}")
        meta, tokens = reply["meta_info"], reply["output_ids"]
        finish = meta["finish_reason"] or {}
        if meta["id"] != self.rid:
            raise ValueError(f"it is for request {meta['id']!r}, not {self.rid!r}")
        if finish.get("matched") == "NaN happened":
            raise EngineError("SGLang met a NaN in the logits and stopped the request: its weights are damaged")
        log_probs = self._log_probs(meta, bool(tokens))
        if not first and "prompt_tokens" not in meta:
            tokens, log_probs = [], []  # the echo of an abort in the queue: it repeats the last token of a stream
        self._check(tokens, log_probs)
        prompt = [row[0] or 0.0 for row in meta.get("input_token_logprobs") or ()]
        asked = meta.get("output_token_ids_logprobs")
        return Piece(
            tokens,
            log_probs,
            int(version) if (version := str(meta["weight_version"])).isdecimal() else -1,
            REASONS[finish.get("type")],
            meta.get("routed_experts"),
            meta.get("cached_tokens", 0),
            prompt,
            asked[0][0][0] if asked else None,
        )

    def _log_probs(self, meta: dict[str, Any], any_tokens: bool) -> list[float]:
        if not self.truncates:
            return [row[0] for row in meta.get("output_token_logprobs") or ()]
        found = meta.get("output_token_sampling_logprobs")
        if found is None and any_tokens:
            raise EngineError(
                "the server tells log-probabilities of the whole distribution only, and this request samples from a "
                "truncated one (top_p, top_k or min_p): use SGLang 0.5.17 or newer, or sample from all tokens"
            )
        return found or []

    def _check(self, tokens: list[int], log_probs: list[float]) -> None:
        if len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens with {len(log_probs)} log-probabilities")
        if tokens and (min(tokens) < 0 or max(tokens) >= self.vocabulary):
            raise ValueError(f"tokens outside the vocabulary [0, {self.vocabulary})")
        if not math.isfinite(sum(log_probs)):
            raise ValueError("log-probabilities that are not finite")


class Answer:
    """The answer to a request, put together from pieces. Between two of them the weights may have changed."""

    def __init__(self, request: GenerateRequest, routing: Routing | None = None):
        self.request, self.routing = request, routing
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason = ""
        self.cached_tokens = 0
        self._experts: list[np.ndarray] = []
        self._asked_at = 0

    def ask_on(self) -> None:
        """What comes from here on answers another request than what came before."""
        self._asked_at = len(self.tokens)

    @property
    def experts_from(self) -> int:
        """The first row of expert choices that is not here yet."""
        return self.request.routed_experts_from + sum(map(len, self._experts))

    def add(self, piece: Piece) -> None:
        """Take a piece in. Its finish reason is not the answer's yet: an abort may have been ours.

        Raises:
            MalformedError: its rows of expert choices do not go with its tokens.
        """
        cached = self.cached_tokens or (0 if self.tokens else piece.cached_tokens)
        length = len(self.request.tokens) + len(self.tokens) + len(piece.tokens)
        if self.routing and self.request.routed_experts and piece.experts:
            self._experts.append(self._rows(piece, self.routing, length - 1 - self.experts_from))
        self.tokens += piece.tokens
        self.log_probs += piece.log_probs
        self.versions += [piece.version] * len(piece.tokens)
        self.cached_tokens = cached

    def _rows(self, piece: Piece, routing: Routing, count: int) -> np.ndarray:
        """Its expert choices. Rows that an earlier piece lost were computed anew, by this piece's weights: they are
        void where the token that they predict was drawn by others."""
        try:
            found = np.frombuffer(base64.b64decode(cast(str, piece.experts), validate=True), np.int32)
            rows = found.reshape(count, routing.layers, routing.top_k)
            first = self.experts_from + 1 - len(self.request.tokens)  # place in `tokens` of what row 0 predicted
            void = [v != piece.version for v in self.versions[max(first, 0) : self._asked_at]]
            if any(void):
                rows = rows.copy()
                rows[max(-first, 0) :][: len(void)][void] = -1
            return compact_experts(rows, routing.experts)
        except (TypeError, ValueError, EngineError) as error:
            wanted = f"[{count}, {routing.layers}, {routing.top_k}]"
            raise MalformedError(f"SGLang sent expert choices that are not {wanted}: {error}") from error

    def result(self) -> GenerateResult:
        """All of it."""
        reason = cast(Literal["stop", "length", "abort"], self.finish_reason)
        return GenerateResult(
            self.tokens, self.log_probs, reason, self.versions, self._all_experts(), self.cached_tokens
        )

    def _all_experts(self) -> np.ndarray | None:
        """None where the rows of the last tokens were lost: an abort in the queue does not tell them."""
        whole = self.experts_from == len(self.request.tokens) + len(self.tokens) - 1
        return np.concatenate(self._experts) if self._experts and whole else None
