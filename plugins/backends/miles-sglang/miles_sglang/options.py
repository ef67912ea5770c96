"""Options of the engines `sglang` and `sglang_external`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

Seconds = Annotated[float, Field(gt=0)]


class ClientOptions(BaseModel):
    """How requests reach servers, whoever started these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: Seconds = 3600.0
    """Of one attempt at a request that generates or scores."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a request is tried again after a fault that may pass, before it is an error."""
    start_timeout: Seconds = 1200.0
    """Until a server answers that it is healthy."""
    stream: bool = False
    """Receive tokens as they are made. Slower; weights can then change under running requests (pausing `in_place`)."""


class SGLangOptions(ClientOptions):
    """Of `sglang`. What is not listed here is an argument of SGLang's server: `mem_fraction_static` is
    `--mem-fraction-static`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tp_size: Annotated[int, Field(gt=0)] | None = None
    """GPUs of one server; all of the engine when not given. With fewer there are several servers behind a router."""
    router_policy: str | None = None
    """How the router chooses a server: `cache_aware` when not given; `round_robin`, `random`, `power_of_two`."""
    router_request_timeout_secs: Annotated[int, Field(gt=0)] = 14400


class ExternalOptions(ClientOptions):
    """Of `sglang_external`."""

    urls: tuple[str, ...]
    """`http://HOST:PORT` or `HOST:PORT` of each running server."""
    router_ip: str | None = None
    """Of a running router in front of these servers: requests then go to it."""
    router_port: Annotated[int, Field(gt=0, lt=65536)] | None = None

    @field_validator("urls", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _complete(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one: http://HOST:PORT")
        return tuple((url if "://" in url else f"http://{url}").rstrip("/") for url in value)
