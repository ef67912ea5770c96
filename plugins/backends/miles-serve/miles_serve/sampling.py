"""SGLang's sampling parameters, and what an engine of miles makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from miles.api import SamplingParams
from miles_serve.errors import RequestError

GREEDY_BELOW = 1e-6
"""Temperatures under this are taken as 0, as SGLang takes them."""
TOP_K_ALL = 1 << 30
"""What SGLang reads as "no top_k", besides -1."""
UNSUPPORTED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "json_schema": "",
    "regex": "",
    "ebnf": "",
    "structural_tag": "",
    "stop_regex": [],
    "custom_params": {},
}
"""Parameters that would change the answer and that no engine of miles knows, each with the value that changes nothing
(as does null)."""


class SamplingBody(BaseModel):
    """`sampling_params` of a request. A parameter that nobody knows is refused: it was meant to do something."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(ge=0)] | None = 128
    min_new_tokens: Annotated[int, Field(ge=0)] | None = 0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: int | None = -1
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    no_stop_trim: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    """Accepted; text is written as the tokenizer writes it."""
    stream_interval: int | None = None
    """Accepted; pieces of a stream are as long as the engine makes them."""
    n: Annotated[int, Field(ge=1, le=4096)] | None = 1
    sampling_seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    stop_regex: str | list[str] | None = None
    custom_params: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the answers to one prompt are drawn, and how their text is written."""

    params: SamplingParams
    """As the engine gets them: tokens that end a response are among `stop_token_ids`."""
    n: int
    seed: int | None
    trims_stops: bool
    """Text ends before the stop token or string that ended the response."""
    skips_special: bool


def read_sampling(body: SamplingBody, end_token_ids: tuple[int, ...], room: int) -> Sampling:
    """Check parameters against each other and fill in what was left out.

    Args:
        end_token_ids: what ends a response of this model.
        room: tokens that fit after the prompt.

    Raises:
        RequestError: no engine of miles samples like this.
    """
    for name, neutral in UNSUPPORTED.items():
        given = getattr(body, name)
        if given is not None and given != neutral and given != type(given)():
            raise RequestError(f"{name} is not supported by this server; leave it out.")
    given = "max_new_tokens" in body.model_fields_set
    most = room if body.max_new_tokens is None else body.max_new_tokens if given else min(body.max_new_tokens, room)
    least = body.min_new_tokens or 0
    if least > most:
        raise RequestError(f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.")
    temperature = 1.0 if body.temperature is None else body.temperature
    greedy = temperature < GREEDY_BELOW  # then SGLang does not look at top_k
    top_k = -1 if greedy or body.top_k in (None, TOP_K_ALL) else body.top_k
    if top_k == 0 or top_k < -1:
        raise RequestError(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stops:
        raise RequestError("stop must not hold an empty string.")
    ends = () if body.ignore_eos else tuple(dict.fromkeys((*(body.stop_token_ids or ()), *end_token_ids)))
    params = SamplingParams(
        temperature=0.0 if greedy else temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=top_k,
        min_p=body.min_p or 0.0,
        max_new_tokens=most,
        min_new_tokens=least,
        stop=tuple(stops),
        stop_token_ids=ends,
    )
    return Sampling(
        params, body.n or 1, body.sampling_seed, not body.no_stop_trim, body.skip_special_tokens is not False
    )
