"""`Service`: what both APIs are put in front of. An engine, its tokenizer and chat format, and who asks it for what.

Handlers check the shape of what a client sent; here it is checked against the model, so that nothing reaches the
engine that it would have to refuse.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.api import ChatFormat, GenerateRequest, GenerateResult, RolloutEngine, SamplingParams
from miles_serve.errors import RequestError


@dataclass(eq=False)
class Service:
    """An engine that was started, and what is known of its model."""

    engine: RolloutEngine
    chat: ChatFormat
    tokenizer: Any
    """A transformers tokenizer."""
    hf_config: Any
    model: str
    """The name under which clients know it."""
    model_path: str
    context_length: int
    """Tokens of the longest sequence, prompt included."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a response unless a client says otherwise (`ignore_eos`)."""
    chat_with: Callable[[Mapping[str, Any]], ChatFormat] | None = None
    """The chat format with other options of its template (`enable_thinking`), for clients that ask for them."""
    api_key: str | None = None
    """What clients have to send as `Authorization: Bearer ...`; nothing when None."""
    started: float = field(default_factory=time.time)
    underway: dict[str, GenerateRequest] = field(default_factory=dict)
    """Requests that the engine has, by id."""

    @property
    def vocabulary(self) -> int:
        return int(self.hf_config.get_text_config().vocab_size)

    def request(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        id: str | None = None,
        seed: int | None = None,
        routed_experts: bool = False,
        priority: int = 0,
    ) -> GenerateRequest:
        """A request that the engine can serve. Without a seed it draws anew each time.

        Raises:
            RequestError: it cannot: tokens outside the vocabulary, too long, sampling that means nothing.
        """
        self.check_tokens(tokens)
        self.check_length(len(tokens), sampling.max_new_tokens)
        return GenerateRequest(
            id=id or uuid.uuid4().hex,
            tokens=list(tokens),
            sampling=sampling,
            seed=uuid.uuid4().int % 2**63 if seed is None else seed,
            routed_experts=routed_experts,
            priority=priority,
        )

    def check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise RequestError("The prompt is empty: at least one token is needed.")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < self.vocabulary)
            raise RequestError(f"Token {wrong} is outside of the vocabulary, [0, {self.vocabulary}).")

    def check_length(self, prompt: int, new: int) -> None:
        """`new` tokens at most are to follow a prompt of so many."""
        if prompt >= self.context_length:
            raise RequestError(
                f"The input ({prompt} tokens) is longer than the model's context length ({self.context_length} tokens).",
                code="context_length_exceeded",
            )
        if prompt + new > self.context_length:
            raise RequestError(
                f"The input ({prompt} tokens) and max_new_tokens ({new}) together exceed the model's context length "
                f"({self.context_length} tokens)."
            )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The whole answer. Cancelling it aborts the request.

        Raises:
            RequestError: a request of this id is under way.
            EngineError: see `RolloutEngine.generate`.
        """
        self._enter(request)
        try:
            return await self.engine.generate(request)
        finally:
            del self.underway[request.id]

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        """The answer as it is made: each piece holds the tokens since the one before, and only the last says how it
        finished. One piece with everything where the engine has no streams."""
        self._enter(request)
        try:
            if streams := getattr(self.engine, "stream", None):
                async for piece in streams(request):
                    yield piece
            else:
                yield await self.engine.generate(request)
        finally:
            del self.underway[request.id]

    def _enter(self, request: GenerateRequest) -> None:
        if request.id in self.underway:
            raise RequestError(f"A request with the id {request.id!r} is under way already.")
        self.underway[request.id] = request
