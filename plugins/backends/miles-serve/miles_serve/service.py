"""`Service`: what both APIs are put in front of. An engine, its tokenizer and chat format, and who asks it for what.

Handlers check the shape of what a client sent; here it is checked against the model, so that nothing reaches the
engine that it would have to refuse.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from miles.api import ChatFormat, GenerateRequest, GenerateResult, RolloutEngine, SamplingParams
from miles_serve.errors import RequestError
from miles_serve.traffic import Traffic
from miles_serve.vocabulary import Vocabulary

T = TypeVar("T")


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
    incremental: bool = False
    """Pieces of native streams hold what is new, and not everything so far."""
    started: float = field(default_factory=time.time)
    traffic: Traffic = field(default_factory=Traffic)
    version: int = 0
    """The engine's version of its weights."""
    labels: dict[int, str] = field(default_factory=dict)
    """What clients call a version, where that is not its number."""
    stopping: bool = False
    """No request is taken any more."""
    _scoring: dict[str, asyncio.Future] = field(default_factory=dict)
    """Scores that are being computed, by the ids of their requests."""

    @cached_property
    def vocabulary(self) -> int:
        return int(self.hf_config.get_text_config().vocab_size)

    @cached_property
    def pieces(self) -> Vocabulary:
        """The bytes behind tokens."""
        return Vocabulary(self.tokenizer)

    @property
    def routes(self) -> bool:
        """Whether the model has experts to choose from."""
        return getattr(self.hf_config.get_text_config(), "num_experts_per_tok", None) is not None

    def label(self, version: int | None = None) -> str:
        """What clients call a version of the weights; that of now if none is given."""
        version = self.version if version is None else version
        return self.labels.get(version, str(version))

    def request(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams,
        *,
        id: str | None = None,
        seed: int | None = None,
        routed_experts: bool = False,
        routed_experts_from: int = 0,
        priority: int = 0,
    ) -> GenerateRequest:
        """A request that the engine can serve. Without a seed it draws anew each time.

        Raises:
            RequestError: it cannot: tokens outside the vocabulary, too many of them, experts of a dense model.
        """
        if routed_experts and not self.routes:
            raise RequestError("return_routed_experts: the model has no experts.")
        self.check_tokens(tokens)
        self.check_length(len(tokens), sampling.max_new_tokens)
        return GenerateRequest(
            id=id or uuid.uuid4().hex,
            tokens=list(tokens),
            sampling=sampling,
            seed=uuid.uuid4().int % 2**63 if seed is None else seed,
            routed_experts=routed_experts,
            routed_experts_from=routed_experts_from,
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
                f"The input ({prompt} tokens) is longer than the model's context length ({self.context_length} "
                "tokens).",
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
        async with self.traffic.entered(request.id) as entered:
            return await self.engine.generate(request) if entered else _nothing()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateResult, None]:
        """The answer as it is made: each piece holds the tokens since the one before, and only the last says how it
        finished. One piece with everything where the engine has no streams."""
        async with self.traffic.entered(request.id) as entered:
            if not entered or not hasattr(self.engine, "stream"):
                yield await self.engine.generate(request) if entered else _nothing()
                return
            async with aclosing(self.engine.stream(request)) as pieces:
                async for piece in pieces:
                    yield piece

    async def score(self, id: str, work: Coroutine[Any, Any, T]) -> T | None:
        """What the engine says of given tokens, as a request that can be aborted: None if it was."""
        with closing(work):
            async with self.traffic.entered(id) as entered:
                if not entered:
                    return None
                self._scoring[id] = task = asyncio.ensure_future(work)
                try:
                    await asyncio.wait([task])
                    return None if task.cancelled() else task.result()
                finally:
                    task.cancel()
                    await asyncio.wait([task])
                    del self._scoring[id]

    async def abort(self, prefix: str = "") -> None:
        """End the requests whose ids begin like this; on return they have ended. Those that come later are spared."""
        self.traffic.turn_away(prefix)
        chosen = [id for id in self.traffic.underway if id.startswith(prefix)]
        for id in chosen:
            if id in self._scoring:
                self._scoring[id].cancel()
        if prefix:
            await asyncio.gather(*(self.engine.abort(id) for id in chosen))
        else:
            await self.engine.abort()

    async def settle(self, seconds: float) -> None:
        """Take no more requests, give those under way so many seconds, then abort them: they are answered with what
        they have."""
        self.stopping = True
        self.traffic.turn_away()
        if not await self.traffic.idle(seconds):
            await self.abort()
            await self.traffic.idle(seconds)


def _nothing() -> GenerateResult:
    """The answer to a request that was aborted before the engine had it."""
    return GenerateResult([], [], "abort", [])
