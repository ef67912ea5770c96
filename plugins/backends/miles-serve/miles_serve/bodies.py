"""Bodies of SGLang's HTTP API: which fields there are and what they hold. Fields that are not listed are ignored, as
SGLang ignores them; those that would change the answer and are not supported are refused.

SGLang takes GET for some calls of control, and an absent body for those whose fields all have defaults; so does this.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from miles_serve.errors import RequestError
from miles_serve.sampling import SamplingBody

Model = TypeVar("Model", bound=BaseModel)
UNSUPPORTED = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "return_hidden_states",
    "lora_path",
    "custom_logit_processor",
    "session_params",
    "positional_embed_overrides",
    "return_indexer_topk",
    "return_entropy",
    "return_flat_raw_top_logprobs",
    "max_thinking_tokens",
)
"""Fields of `/generate` that would change the answer."""
TOLD = 3
"""Faults of a body that one error tells."""


Tokens = Annotated[list[int], Field(fail_fast=True)]
"""Thousands of them that are none are one fault."""


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class GenerateBody(Body):
    """`/generate`. What may be a list is one entry a prompt where several prompts are sent."""

    model_config = ConfigDict(strict=True, extra="allow")

    rid: str | list[str] | None = None
    text: str | list[str] | None = None
    input_ids: Tokens | Annotated[list[Tokens], Field(fail_fast=True)] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    """First prompt token whose log-prob is told; -1 for none."""
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: Tokens | None = None
    """Tokens whose log-probs as the first one of the answer are told, at the answer's temperature."""
    return_text_in_logprobs: bool = False
    return_sampling_mask: bool | list[bool] | None = None
    input_logprob_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Not SGLang's: prompt tokens are scored at this temperature instead of 1."""
    stream: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    priority: int | None = None
    return_prompt_token_ids: bool = False


class TokenizeBody(Body):
    prompt: str | list[str]
    add_special_tokens: bool = True


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(Body):
    rid: str | None = None
    abort_all: bool = False


class MemoryBody(Body):
    tags: list[str] | None = None


class DiskBody(Body):
    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True
    """Accepted; caches of older weights are always forgotten."""


class VersionBody(Body):
    new_version: str
    abort_all_requests: bool = True


async def read(request: web.Request, model: type[Model]) -> Model:
    """The body of a request.

    Raises:
        RequestError: it is not JSON, no object, or a field is missing or of the wrong type.
    """
    raw = await request.read()
    try:
        given = json.loads(raw) if raw.strip() else {}
        if b"\\u" in raw or not raw.isascii():
            json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(f"The body must be a JSON object, not {type(given).__name__}.")
    return check(given, model)


def check(given: dict[str, Any], model: type[Model]) -> Model:
    """Raises RequestError with the first fault of each field, of `TOLD` of them."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = faults(error)
        told = [f"{path}: {message}" for path, message in found.items()]
        more = [f"and {len(told) - TOLD} more"] if len(told) > TOLD else []
        raise RequestError("; ".join(told[:TOLD] + more) + ".", param=next(iter(found))) from error


def faults(error: ValidationError) -> dict[str, str]:
    """What is wrong with each field. Of a field that may be of several types, what is wrong farthest inside."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"] if not _is_choice(str(part)))
        no_object = item["type"] == "model_type"  # pydantic would name a class of ours
        told = f"Input should be an object, not {type(item['input']).__name__}" if no_object else item["msg"]
        found.setdefault(path or "body", told)
    return {path: told for path, told in found.items() if not any(other.startswith(f"{path}.") for other in found)}


def _is_choice(part: str) -> bool:
    """Whether a step of a path names one of the types that a field may have, and nothing in the body."""
    return part in ("str", "int", "bool", "SamplingBody") or part.startswith(("list[", "constrained-"))
