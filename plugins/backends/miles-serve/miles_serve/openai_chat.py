"""POST /v1/chat/completions: one rendering of the chat layer's answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from miles.api import ChatFormat, ConfigError, GenerateRequest
from miles_serve.chat import Answer, ChatLayer, Piece
from miles_serve.concurrent import all_of, merged
from miles_serve.errors import RequestError
from miles_serve.logprobs import chat_logprobs
from miles_serve.openai_messages import MessageWriter, as_message
from miles_serve.openai_reply import Envelope, meta_info, new_id, usage
from miles_serve.openai_requests import asked
from miles_serve.openai_types import ChatBody
from miles_serve.replies import Speaker
from miles_serve.service import Service
from miles_serve.sse import EventStream


@dataclass(frozen=True)
class Chat:
    """One request, understood: what the engine is asked, once for every choice."""

    service: Speaker
    body: ChatBody
    layer: ChatLayer
    id: str
    requests: list[GenerateRequest]

    @property
    def reading(self) -> dict[str, bool]:
        """How answers are read: see `ChatLayer.stream`."""
        return {"calls": bool(self.body.offered), "trim": not self.body.no_stop_trim}

    def extras(self, index: int, tokens: Sequence[int], log_probs: Sequence[float], first: bool) -> dict[str, Any]:
        """What a choice, or a piece of it, says of its tokens. `first`: the prompt's are told with them."""
        body = self.body
        extras: dict[str, Any] = {"logprobs": None}
        if body.logprobs:
            as_ids = bool(body.return_tokens_as_token_ids)
            extras["logprobs"] = chat_logprobs(self.service.pieces, tokens, log_probs, as_ids)
        if body.return_token_ids:
            extras["token_ids"] = list(tokens)
            if first:
                extras["prompt_token_ids"] = self.requests[index].tokens
        return extras


def understood(service: Service, body: ChatBody) -> Chat:
    """Raises RequestError, or what the chat format says of the messages."""
    layer = layer_for(service, body.chat_template_kwargs or {})
    prompt = body.input_ids or layer.prompt([as_message(message) for message in body.messages], body.offered)
    id = body.rid or new_id("chatcmpl")
    requests = asked(service, body, prompt, id, one_call(layer, body), layer.chat.stop_token_ids)
    return Chat(service, body, layer, id, requests)


def layer_for(service: Service, template_kwargs: Mapping[str, Any]) -> ChatLayer:
    """The chat layer, with these options of the template."""
    chat = _with_options(service, template_kwargs) if template_kwargs else service.chat
    return ChatLayer(chat, service.pieces, service.generate, service.stream)


def _with_options(service: Service, template_kwargs: Mapping[str, Any]) -> ChatFormat:
    """Options of the template are a client's to choose; the template and how it is called are not."""
    name = "chat_template_kwargs"
    taken = sorted(template_kwargs.keys() & inspect.signature(service.tokenizer.apply_chat_template).parameters.keys())
    if taken or service.chat_with is None:
        raise RequestError(f"{name}: {', '.join(taken or template_kwargs)} cannot be set here.", param=name)
    try:
        return service.chat_with(template_kwargs)
    except ConfigError as error:
        raise RequestError(str(error), param=name) from error


def one_call(layer: ChatLayer, body: ChatBody) -> tuple[str, ...]:
    """Where an answer ends that may make a single call: `parallel_tool_calls` is false."""
    if body.parallel_tool_calls is not False or not body.offered:
        return ()
    if layer.markup is None:
        raise RequestError(
            "parallel_tool_calls: false is not supported here: it is not known how a call of this model ends.",
            param="parallel_tool_calls",
        )
    return (layer.markup.call[1],)


async def reply(chat: Chat) -> web.Response:
    """The answers, once all are made."""
    answers = await all_of([chat.layer.answer(request) for request in chat.requests])
    choices = [_choice(chat, index, answer) for index, answer in enumerate(answers)]
    envelope = Envelope(chat.service.model, "chat.completion", chat.id)
    counted = usage(chat.requests, [answer.result for answer in answers])
    return web.json_response(envelope.around(choices, usage=counted))


def _choice(chat: Chat, index: int, answer: Answer) -> dict[str, Any]:
    writer, result = MessageWriter(), answer.result
    choice = {
        "index": index,
        "message": writer.message(chat.layer.said(answer, **chat.reading)),
        "finish_reason": writer.finish_reason(result.finish_reason),
        **chat.extras(index, result.tokens, result.log_probs, first=True),
    }
    if chat.body.return_meta_info:
        choice["meta_info"] = meta_info(chat.service, answer.request, result, bool(chat.body.logprobs))
    return choice


async def stream(chat: Chat, events: EventStream) -> web.StreamResponse:
    """The answers while they are made: the role first, then what was said, and why it ended."""
    envelope = Envelope(chat.service.model, "chat.completion.chunk", chat.id)
    writers = [MessageWriter() for _ in chat.requests]
    begun: set[int] = set()
    answers: dict[int, Answer] = {}
    sources = [chat.layer.stream(request, **chat.reading) for request in chat.requests]
    async with aclosing(merged(sources)) as pieces:
        async for index, piece in pieces:
            if index not in begun:
                await events.send(envelope.around([_delta(index, {"role": "assistant", "content": ""})]))
            for choice in _choices(chat, index, piece, writers[index], index not in begun):
                await events.send(envelope.around([choice]))
            begun.add(index)
            if piece.answer:
                answers[index] = piece.answer
    if chat.body.stream_options and chat.body.stream_options.include_usage:
        results = [answers[index].result for index in range(len(chat.requests))]
        await events.send(envelope.around([], usage=usage(chat.requests, results)))
    return await events.done()


def _choices(chat: Chat, index: int, piece: Piece, writer: MessageWriter, first: bool) -> list[dict[str, Any]]:
    """A piece of an answer as choices of chunks; what is told of its tokens goes with the first."""
    tells = chat.body.logprobs or chat.body.return_token_ids
    deltas = [writer.delta(said) for said in piece.said] or ([{}] if tells and piece.result.tokens else [])
    choices = [_delta(index, delta) for delta in deltas]
    if choices:
        choices[0] |= chat.extras(index, piece.result.tokens, piece.result.log_probs, first)
    if piece.answer:
        choices.append(_delta(index, {}, writer.finish_reason(piece.answer.result.finish_reason)))
    return choices


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
