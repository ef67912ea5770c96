"""POST /v1/completions: text that goes on from a prompt, which is text or tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from miles.api import EngineError, GenerateRequest, GenerateResult
from miles_serve.chat import joined
from miles_serve.concurrent import all_of, merged
from miles_serve.logprobs import CompletionLogprobs
from miles_serve.openai_reply import Envelope, meta_info, new_id, usage
from miles_serve.openai_requests import asked
from miles_serve.openai_types import CompletionBody
from miles_serve.reading import StopCut
from miles_serve.service import Service
from miles_serve.sse import EventStream
from miles_serve.vocabulary import TextStream


@dataclass(frozen=True)
class Completions:
    """One request, understood: what the engine is asked, once for every choice."""

    service: Service
    body: CompletionBody
    id: str
    requests: list[GenerateRequest]


def understood(service: Service, body: CompletionBody) -> Completions:
    """Raises RequestError."""
    id = body.rid or new_id("cmpl")
    requests: list[GenerateRequest] = []
    several = len(body.prompts) > 1
    for number, prompt in enumerate(body.prompts):
        tokens = service.chat.render_text(prompt) if isinstance(prompt, str) else prompt
        name = f"{id}-{number}" if several else id
        requests += asked(service, body, tokens, name, ends=service.end_token_ids)
    return Completions(service, body, id, requests)


@dataclass(frozen=True)
class Part:
    """A piece of one choice."""

    choice: dict[str, Any]
    result: GenerateResult | None = None
    """The whole, with the last piece."""


class Writer:
    """Writes one choice: the prompt where it is echoed, and what follows."""

    def __init__(self, completions: Completions, index: int):
        self.service, self.body, self.index = completions.service, completions.body, index
        self.request = completions.requests[index]
        self._ends = frozenset(self.request.sampling.stop_token_ids)
        self._text = TextStream(self.service.pieces, special=False)
        self._cut = StopCut(() if self.body.no_stop_trim else self.request.sampling.stop)
        self._log_probs = CompletionLogprobs(self.service.pieces, bool(self.body.return_tokens_as_token_ids))

    async def parts(self) -> AsyncIterator[Part]:
        """The choice as it is made."""
        if self.body.echo:
            yield Part(await self._echo())
        if not self.request.sampling.max_new_tokens:
            nothing = GenerateResult([], [], "length", [])
            yield Part(self._part("", nothing), nothing)
            return
        heard: list[GenerateResult] = []
        async with aclosing(self.service.stream(self.request)) as results:
            async for result in results:
                heard.append(result)
                yield Part(self._heard(result), joined(heard) if result.finish_reason else None)

    def whole(self, parts: list[Part]) -> dict[str, Any]:
        """The choice from all its parts."""
        choices = [part.choice for part in parts]
        choice = {**choices[-1], "text": "".join(choice["text"] for choice in choices)}
        if self.body.logprobs is not None:
            choice["logprobs"] = _together([choice["logprobs"] for choice in choices])
        if self.body.return_token_ids:
            choice["token_ids"] = [token for choice in choices for token in choice.get("token_ids", ())]
            choice["prompt_token_ids"] = self.request.tokens
        if self.body.return_meta_info and (result := parts[-1].result):
            choice["meta_info"] = meta_info(self.service, self.request, result, self.body.logprobs is not None)
        return choice

    async def _echo(self) -> dict[str, Any]:
        tokens, body = self.request.tokens, self.body
        text = TextStream(self.service.pieces, special=False)
        choice: dict[str, Any] = self._choice(text.feed(tokens) + text.close())
        if body.logprobs is not None:
            scoring = self.service.engine.score(tokens, self.request.sampling.temperature or 1.0)
            told = await self.service.score(self.request.id, scoring)
            if told is None:
                raise EngineError("the request was aborted while its prompt was scored")
            choice["logprobs"] = self._log_probs.of(tokens, [None, *(float(value) for value in told[1:])])
        return choice

    def _heard(self, result: GenerateResult) -> dict[str, Any]:
        text = self._cut.feed(self._text.feed([token for token in result.tokens if token not in self._ends]))
        if result.finish_reason:
            text += self._cut.feed(self._text.close()) + self._cut.close()
        return self._part(text, result)

    def _part(self, text: str, result: GenerateResult) -> dict[str, Any]:
        choice = self._choice(text, result.finish_reason or None)
        if self.body.logprobs is not None:
            choice["logprobs"] = self._log_probs.of(result.tokens, result.log_probs)
        if self.body.return_token_ids:
            choice["token_ids"] = result.tokens
        return choice

    def _choice(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": None, "finish_reason": finish_reason}


async def reply(completions: Completions) -> web.Response:
    """The answers, once all are made."""

    async def one(index: int) -> tuple[dict[str, Any], GenerateResult]:
        writer = Writer(completions, index)
        parts = [part async for part in writer.parts()]
        return writer.whole(parts), next(part.result for part in parts if part.result)

    answers = await all_of([one(index) for index in range(len(completions.requests))])
    counted = _usage(completions, [result for _, result in answers])
    envelope = Envelope(completions.service.model, "text_completion", completions.id)
    return web.json_response(envelope.around([choice for choice, _ in answers], usage=counted))


async def stream(completions: Completions, events: EventStream) -> web.StreamResponse:
    """The answers while they are made."""
    body = completions.body
    envelope = Envelope(completions.service.model, "text_completion", completions.id)
    results: dict[int, GenerateResult] = {}
    indices = range(len(completions.requests))
    async with aclosing(merged([Writer(completions, index).parts() for index in indices])) as parts:
        async for index, part in parts:
            tells = part.choice["text"] or part.choice["logprobs"] or part.choice.get("token_ids")
            if tells or part.result:
                await events.send(envelope.around([part.choice]))
            if part.result:
                results[index] = part.result
    if body.stream_options and body.stream_options.include_usage:
        await events.send(envelope.around([], usage=_usage(completions, [results[index] for index in indices])))
    return await events.done()


def _usage(completions: Completions, results: list[GenerateResult]) -> dict[str, Any]:
    return usage(completions.requests, results, len(completions.body.prompts))


def _together(parts: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Log-probabilities of several pieces as one."""
    told = [part for part in parts if part]
    lists = ("tokens", "token_logprobs", "text_offset")
    return {**told[-1], **{name: [value for part in told for value in part[name]] for name in lists}}
