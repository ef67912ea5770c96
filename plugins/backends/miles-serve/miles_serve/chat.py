"""The chat layer: messages and tools in, what the assistant did out, and the exact tokens between.

    prompt = layer.prompt(messages, tools)                          # tokens of a conversation
    answer = await layer.answer(service.request(prompt, layer.sampling(SamplingParams())))
    answer.action                                                   # text, reasoning, tool calls
    prompt = layer.prompt(what_came_next, earlier=answer.tokens)    # nothing said before is tokenised again

An `Answer` holds everything that there is to know of one turn. An OpenAI reply is one rendering of it, the tokens,
log-probabilities and weight versions of a training sample are another. There is no HTTP in here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles.api import Action, ChatFormat, GenerateRequest, GenerateResult, Message, SamplingParams
from miles_serve.reading import Reading, Said
from miles_serve.vocabulary import TextStream, Vocabulary

Generate = Callable[[GenerateRequest], Awaitable[GenerateResult]]
Stream = Callable[[GenerateRequest], AsyncIterator[GenerateResult]]
OPENING = 8
"""Tokens at the end of a prompt among which the tag that opens the reasoning is looked for."""


@dataclass(frozen=True)
class Answer:
    """One turn of the assistant."""

    request: GenerateRequest
    result: GenerateResult
    action: Action

    @property
    def tokens(self) -> list[int]:
        """The conversation up to here: the prompt, and what was said."""
        return [*self.request.tokens, *self.result.tokens]


@dataclass(frozen=True)
class Piece:
    """Some tokens of an answer that is being made."""

    result: GenerateResult
    """Of these tokens alone."""
    said: list[Said]
    """What is certain now and was not before."""
    answer: Answer | None = None
    """The whole, in the last piece."""


class ChatLayer:
    """A chat format in front of an engine."""

    def __init__(self, chat: ChatFormat, vocabulary: Vocabulary, generate: Generate, stream: Stream | None = None):
        """
        Args:
            chat: of the model's family.
            vocabulary: of the tokenizer that `chat` uses.
            generate: asks the engine, or whoever stands in front of it.
            stream: the same in pieces; without it an answer is one piece.
        """
        self.chat, self.vocabulary = chat, vocabulary
        self.generate = generate
        self._stream = stream or self._in_one_piece
        self.markup = getattr(chat, "markup", None)

    async def _in_one_piece(self, request: GenerateRequest) -> AsyncIterator[GenerateResult]:
        yield await self.generate(request)

    # ---------------------------------------------------------------------------------------------------- what is asked

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, earlier: Sequence[int] = ()
    ) -> list[int]:
        """Tokens of a conversation in which the assistant speaks next.

        Args:
            messages: the conversation; with `earlier`, what came after the assistant's last turn.
            tools: OpenAI schemas; part of the first prompt alone.
            earlier: the conversation so far, ending with what the assistant said: `Answer.tokens`.

        Raises:
            DataError, ConfigError: the format does not take these messages or tools.
        """
        if not earlier:
            return self.chat.render_prompt(messages, tools)
        closed = earlier[-1] == self.chat.end_of_turn_id
        return [*earlier, *self.chat.render_next(messages, closed)]

    def sampling(self, params: SamplingParams) -> SamplingParams:
        """The same, ending where the format ends a turn."""
        ends = dict.fromkeys((*params.stop_token_ids, *self.chat.stop_token_ids))
        return replace(params, stop_token_ids=tuple(ends))

    # ---------------------------------------------------------------------------------------------------- what was said

    async def answer(self, request: GenerateRequest) -> Answer:
        """Let the assistant speak. Raises what the engine raises."""
        return self.answered(request, await self.generate(request))

    def answered(self, request: GenerateRequest, result: GenerateResult) -> Answer:
        tokens = [*self.opening(request.tokens), *result.tokens]
        return Answer(request, result, self.chat.parse(tokens, result.finish_reason))

    def said(self, answer: Answer, calls: bool = True, trim: bool = True) -> list[Said]:
        """An answer as a client is shown it: see `stream`."""
        listener = _Listener(self, answer.request, calls, trim)
        return [*listener.hear(answer.result.tokens), *listener.end(answer.action)]

    async def stream(self, request: GenerateRequest, calls: bool = True, trim: bool = True) -> AsyncIterator[Piece]:
        """Let the assistant speak, and pass on what it says as soon as it is certain. Ended early, it aborts.

        Args:
            calls: tools were offered; otherwise a call is text.
            trim: a stop string, and what follows it, is left out.
        """
        listener = _Listener(self, request, calls, trim)
        heard: list[GenerateResult] = []
        source = self._stream(request)
        try:
            async for result in source:
                heard.append(result)
                said = listener.hear(result.tokens)
                if not result.finish_reason:
                    yield Piece(result, said)
                    continue
                answer = self.answered(request, joined(heard))
                yield Piece(result, [*said, *listener.end(answer.action)], answer)
        finally:
            if close := getattr(source, "aclose", None):
                await close()

    def opening(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt that opens the assistant's reasoning for it; nothing where it does not."""
        if self.markup is None:
            return []
        tag = self.markup.reasoning[0]
        if tag not in TextStream(self.vocabulary).feed(prompt[-OPENING:]):
            return []
        for start in range(1, OPENING + 1):
            text = TextStream(self.vocabulary).feed(prompt[-start:])
            if tag in text:
                return list(prompt[-start:]) if text.rstrip().endswith(tag) else []
        return []


class _Listener:
    """Reads one answer's tokens."""

    def __init__(self, layer: ChatLayer, request: GenerateRequest, calls: bool, trim: bool):
        self._ends = frozenset(request.sampling.stop_token_ids)
        self._text = TextStream(layer.vocabulary)
        self._reading = Reading(
            layer.markup,
            lambda text: layer.chat.parse(layer.chat.render_text(text)),
            request.sampling.stop if trim else (),
            reasoning=bool(layer.opening(request.tokens)),
            offered=calls,
        )

    def hear(self, tokens: Sequence[int]) -> list[Said]:
        return self._reading.feed(self._text.feed([token for token in tokens if token not in self._ends]))

    def end(self, action: Action) -> list[Said]:
        return [*self._reading.feed(self._text.close()), *self._reading.close(action)]


def joined(pieces: Sequence[GenerateResult]) -> GenerateResult:
    """Pieces of a stream as the result that `generate` would have given."""
    last = pieces[-1]
    return replace(
        last,
        tokens=[token for piece in pieces for token in piece.tokens],
        log_probs=[log_prob for piece in pieces for log_prob in piece.log_probs],
        weight_versions=[version for piece in pieces for version in piece.weight_versions],
    )
