"""What clients of the OpenAI-compatible API may send, and what each field is worth here.

A field that would change what is generated and cannot be honoured is refused with a reason; one that asks for nothing
that the reply could lack is ignored. A name that nobody knows is refused too, as a misspelt `temprature` should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from miles.api import SamplingParams
from miles_serve.errors import RequestError

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "prediction", "reasoning_effort", "verbosity", "spaces_between_special_tokens",
        "cache_salt", "extra_key", "custom_labels", "session_id",
    }
)  # fmt: skip
"""They ask for no other tokens, or for what is done anyway."""
_OWN_DISTRIBUTION = (
    "tokens are drawn from the model's own distribution, so that their log-probabilities are those of it"
)
_NO_GRAMMAR = "what the model writes cannot be constrained"
_NO_CALL = f"{_NO_GRAMMAR}, so no call can be enforced; use auto, and say in the prompt that a tool has to be called"
_NO_TOP = "the engine says how likely the token is that it drew, not how likely others were; ask for 0"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), _OWN_DISTRIBUTION),
    "presence_penalty": ((0,), _OWN_DISTRIBUTION),
    "repetition_penalty": ((1,), _OWN_DISTRIBUTION),
    "logit_bias": (({},), _OWN_DISTRIBUTION),
    "custom_logit_processor": ((), _OWN_DISTRIBUTION),
    "response_format": (({"type": "text"},), f"{_NO_GRAMMAR}; ask for JSON in the prompt, or offer a tool"),
    "json_schema": ((), _NO_GRAMMAR),
    "regex": ((), _NO_GRAMMAR),
    "ebnf": ((), _NO_GRAMMAR),
    "structured_outputs": ((), _NO_GRAMMAR),
    "stop_regex": (([],), "use stop, with strings"),
    "best_of": ((1,), "use n, and choose among the answers"),
    "suffix": (("",), "the model goes on from a prompt, it does not fill gaps"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "modalities": ((["text"],), "engines take and give text"),
    "audio": ((), "engines take and give text"),
    "web_search_options": ((), "there is no search; offer a tool"),
    "continue_final_message": ((False,), "send the tokens to go on from as input_ids"),
    "lora_path": ((), "the engine serves one set of weights"),
    "use_beam_search": ((False,), _OWN_DISTRIBUTION),
    "separate_reasoning": ((True,), "reasoning is always told apart"),
    "stream_reasoning": ((True,), "reasoning is passed on as it is made"),
    "skip_special_tokens": ((True,), "special tokens are no text; return_token_ids tells of them"),
    "moderation": ((), "there is none"),
    "return_hidden_states": ((False,), "the engine does not give them"),
    "return_routed_experts": ((False,), "use /generate, which returns them"),
}
"""Field: values that ask for nothing (besides null), and why others are refused."""


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False
    """Ignored: chunks are never padded."""


class Body(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    """The stop string stays in the text."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    rid: str | None = None
    """Id of the request, for /abort_request."""
    priority: int | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    """Tokens of log-probabilities are written `token_id:17`."""
    return_meta_info: bool | None = False
    """SGLang's `meta_info` with every choice; not in a stream."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_can_be_done(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name in REFUSED and value is not None:
                harmless, reason = REFUSED[name]
                if value not in harmless:
                    raise _unsupported(name, value, reason)
            if name not in (known := [*cls.model_fields, *REFUSED, *IGNORED]):
                close = get_close_matches(name, known, 1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise RequestError(f"Unknown parameter {name}.{hint}", param=name, code="unknown_parameter")
        return given

    @model_validator(mode="after")
    def _whole_with_meta_info(self) -> Self:
        if self.stream and self.return_meta_info:
            raise _unsupported("return_meta_info", True, "it is told of whole answers; leave out stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def most_tokens(self) -> int | None:
        """Longest answer that the client wants; None for as much as there is room for."""
        return None

    def sampling(self, most: int, stops: Sequence[str], ends: Sequence[int]) -> SamplingParams:
        """How to draw at most `most` tokens. An answer also ends at `stops`, and at the tokens `ends` unless the client
        says otherwise."""
        end_ids = (*(self.stop_token_ids or ()), *(() if self.ignore_eos else ends))
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or -1,
            min_p=self.min_p or 0.0,
            max_new_tokens=most,
            min_new_tokens=min(self.min_tokens or 0, most),
            stop=(*self.stops, *stops),
            stop_token_ids=tuple(dict.fromkeys(end_ids)),
        )


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> Part:
        if self.type not in ("text", "refusal"):
            raise ValueError(f"parts of type {self.type!r} are not supported here: engines take and give text")
        return self


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class Called(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: None = None
    """The older form of `tool_calls`, which is not taken."""


class FunctionTool(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: FunctionTool


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    """Shown to the model as they were sent."""
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    input_ids: list[int] | None = None
    """The prompt as tokens; `messages` are then not rendered."""

    @field_validator("tools")
    @classmethod
    def _are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or []:
            Tool.model_validate(tool)
        return tools

    @model_validator(mode="after")
    def _possible(self) -> ChatBody:
        if self.top_logprobs:
            raise _unsupported("top_logprobs", self.top_logprobs, _NO_TOP)
        if self.tool_choice not in (None, "none", "auto"):
            raise _unsupported("tool_choice", self.tool_choice, _NO_CALL)
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []


class CompletionBody(Body):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = False
    logprobs: int | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionBody:
        if self.logprobs:
            raise _unsupported("logprobs", self.logprobs, _NO_TOP)
        if self.max_tokens == 0 and not self.echo:
            raise _unsupported("max_tokens", 0, "without echo there would be no answer at all")
        return self

    @property
    def most_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several, each text or tokens."""
        prompt: Any = self.prompt
        alone = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if alone else prompt


def _unsupported(name: str, value: Any, reason: str) -> RequestError:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return RequestError(f"{name}: {shown} is not supported here: {reason}.", param=name, code="unsupported_value")
