"""What OpenAI's replies have in common: what is around the choices, and what is counted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.api import GenerateRequest, GenerateResult
from miles_serve.asked import Wanted
from miles_serve.replies import Reply, Speaker
from miles_serve.sampling import Sampling


@dataclass(frozen=True)
class Envelope:
    """What is around the choices of one reply, or of every chunk of it."""

    model: str
    kind: str
    """`chat.completion`, `chat.completion.chunk` or `text_completion`."""
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(requests: Sequence[GenerateRequest], results: Sequence[GenerateResult], prompts: int = 1) -> dict[str, Any]:
    """Tokens that were read and made. The answers to one prompt, which lie side by side, count it once.

    Args:
        prompts: of how many prompts these are the answers.
    """
    each = len(requests) // prompts
    asked = sum(len(request.tokens) for request in requests[::each])
    cached = sum(min(result.cached_tokens for result in results[i : i + each]) for i in range(0, len(results), each))
    said = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def meta_info(service: Speaker, request: GenerateRequest, result: GenerateResult, log_probs: bool) -> dict[str, Any]:
    """SGLang's `meta_info` of one answer, for clients that were written for it. How long it took is not known here."""
    wanted = Wanted(
        request=request,
        sampling=Sampling(request.sampling, 1, request.seed, trims_stops=True, skips_special=True),
        log_probs=log_probs,
        score_from=len(request.tokens),
        score_temperature=None,
        top=0,
        candidates=[],
        text_in_log_probs=False,
        sampling_log_probs=False,
        prompt_ids=False,
    )
    told = Reply(service, wanted)
    told.add(result)
    meta: dict[str, Any] = told.whole()["meta_info"]
    del meta["e2e_latency"]
    return meta
