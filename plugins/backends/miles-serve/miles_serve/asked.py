"""What one `/generate` asks for: a list of answers, whether it came as one prompt, a batch, or a prompt and `n`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from miles.api import GenerateRequest
from miles_serve.bodies import UNSUPPORTED, GenerateBody
from miles_serve.errors import RequestError
from miles_serve.sampling import Sampling, SamplingBody, read_sampling
from miles_serve.service import Service

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """One answer that is wanted."""

    request: GenerateRequest
    """With `max_new_tokens` of 0 nothing is generated: the prompt alone is scored."""
    sampling: Sampling
    log_probs: bool
    score_from: int
    """First prompt token whose log-prob is wanted; the length of the prompt for none."""
    score_temperature: float | None
    """None where the client did not say, which is 1."""
    top: int
    """Likeliest prompt tokens to tell of at each place."""
    candidates: list[int]
    """Tokens of which it is wanted how likely each was as the one that is generated."""
    text_in_log_probs: bool
    sampling_log_probs: bool
    """Log-probs are wanted a second time, as those of the truncated distribution."""
    prompt_ids: bool

    @property
    def generates(self) -> bool:
        return self.request.sampling.max_new_tokens > 0

    @property
    def scores(self) -> bool:
        return self.log_probs and self.score_from < len(self.request.tokens)


@dataclass(frozen=True)
class Asked:
    answers: list[Wanted]
    batch: bool
    """The reply is a list."""
    stream: bool


def read_asked(service: Service, body: GenerateBody) -> Asked:
    """Everything is checked before anything is generated.

    Raises:
        RequestError: with what is wrong, of the first prompt that something is wrong with.
    """
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise RequestError(f"{name} is not supported by this server; leave it out.")
    prompts, single = _prompts(service, body)
    count = len(prompts)
    params = _each(body.sampling_params, count, "sampling_params", SamplingBody())
    log_probs = _each(body.return_logprob, count, "return_logprob", False)
    starts = _each(body.logprob_start_len, count, "logprob_start_len", -1)
    tops = _each(body.top_logprobs_num, count, "top_logprobs_num", 0)
    masks = _each(body.return_sampling_mask, count, "return_sampling_mask", False)
    ids = _ids(body.rid, count)
    answers: list[Wanted] = []
    for prompt in map(_Prompt, prompts, ids, params, log_probs, starts, tops, masks):
        answers += _answers(service, body, prompt)
    taken = [wanted.request.id for wanted in answers]
    if len(set(taken)) < len(taken):
        raise RequestError("Duplicate request IDs detected within the request.")
    return Asked(answers, batch=not single or len(answers) > 1, stream=body.stream)


@dataclass(frozen=True)
class _Prompt:
    tokens: list[int]
    rid: str
    params: SamplingBody
    log_probs: bool
    start: int
    top: int
    mask: bool


def _answers(service: Service, body: GenerateBody, prompt: _Prompt) -> list[Wanted]:
    """The answers to one prompt."""
    service.check_tokens(prompt.tokens)
    length = len(prompt.tokens)
    sampling = read_sampling(prompt.params, service.end_token_ids, max(service.context_length - length, 0))
    for name, value, least in (
        ("logprob_start_len", prompt.start, -1),
        ("routed_experts_start_len", body.routed_experts_start_len, 0),
    ):
        if not least <= value <= length:
            raise RequestError(f"{name} must be in [{least}, {length}] for this prompt, got {value}.")
    if prompt.top and not (prompt.top > 0 and hasattr(service.engine, "score_top")):
        raise RequestError("top_logprobs_num is not supported by this engine; leave it out.")
    if prompt.top and sampling.params.max_new_tokens:
        raise RequestError("top_logprobs_num is told of prompts only: ask with max_new_tokens 0.")
    candidates = body.token_ids_logprob or []
    if candidates and sampling.params.max_new_tokens != 1:
        raise RequestError("token_ids_logprob is told of one generated token only: ask with max_new_tokens 1.")
    if candidates:
        service.check_tokens([*candidates])
    return [
        Wanted(
            request=service.request(
                prompt.tokens,
                sampling.params,
                id=prompt.rid if sampling.n == 1 else f"{prompt.rid}_{uuid.uuid4().hex}",
                seed=None if sampling.seed is None else sampling.seed + index,
                routed_experts=body.return_routed_experts,
                routed_experts_from=body.routed_experts_start_len,
                priority=body.priority or 0,
            ),
            sampling=sampling,
            log_probs=prompt.log_probs,
            score_from=length if prompt.start == -1 else prompt.start,
            score_temperature=body.input_logprob_temperature,
            top=prompt.top,
            candidates=candidates,
            text_in_log_probs=body.return_text_in_logprobs,
            sampling_log_probs=prompt.mask,
            prompt_ids=body.return_prompt_token_ids,
        )
        for index in range(sampling.n)
    ]


def _prompts(service: Service, body: GenerateBody) -> tuple[list[list[int]], bool]:
    """Prompts as tokens, and whether there is one that came by itself."""
    if body.text is not None:
        if body.input_ids is not None:
            raise RequestError("Either text or input_ids should be provided, not both.")
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts, single = [service.tokenizer.encode(text) for text in texts], isinstance(body.text, str)
    elif body.input_ids:
        nested = isinstance(body.input_ids[0], list)
        prompts, single = (body.input_ids if nested else [body.input_ids]), not nested
    else:
        raise RequestError("Either text or input_ids should be provided, and not be empty.")
    if not prompts:
        raise RequestError("The batch is empty.")
    return prompts, single


def _ids(given: str | list[str] | None, count: int) -> list[str]:
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, str):
        return [given] if count == 1 else [f"{given}_{i}" for i in range(count)]
    if len(given) != count:
        raise RequestError(f"rid has {len(given)} entries for {count} prompts.")
    return given


def _each(given: Any, count: int, name: str, default: T) -> Sequence[T]:
    """One value a prompt."""
    if not isinstance(given, list):
        return [default if given is None else given] * count
    if len(given) != count:
        raise RequestError(f"{name} has {len(given)} entries for {count} prompts.")
    return given
