"""Options of the engines `sglang` and `sglang_external`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from miles_sglang.flags import faults_of

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
    health_check_interval: Seconds = 30.0
    """Between two questions whether servers with requests still answer. The third without an answer ends the wait."""
    health_check_timeout: Seconds = 30.0
    """For the answer."""
    stream: bool = False
    """Receive tokens as they are made. Slower; weights can then change under running requests (pausing `in_place`)."""


class SGLangOptions(ClientOptions):
    """Of `sglang`. What is not listed here is an argument of SGLang's server: `mem_fraction_static` is
    `--mem-fraction-static`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tp_size: Annotated[int, Field(gt=0)] | None = None
    """GPUs of one server; all of the engine when not given. With fewer there are several servers behind a router."""

    @model_validator(mode="after")
    def _can_be_handed_on(self) -> SGLangOptions:
        if faults := faults_of(self.model_extra or {}):
            raise ValueError("; ".join(faults))
        return self


class ExternalOptions(ClientOptions):
    """Of `sglang_external`."""

    urls: tuple[str, ...]
    """`http://HOST:PORT` or `HOST:PORT` of each running server."""
    router_ip: str | None = None
    """Of a running router in front of these servers: requests then go to it."""
    router_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    api_key_env: str = "SGLANG_API_KEY"
    """Environment variable with the key that these servers want, if they want one."""

    @field_validator("urls", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _complete(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one: http://HOST:PORT")
        return tuple(with_scheme(url) for url in value)

    @model_validator(mode="after")
    def _whole_router(self) -> ExternalOptions:
        if (self.router_ip is None) != (self.router_port is None):
            raise ValueError("router_ip and router_port are given together, or not at all")
        return self

    @property
    def router(self) -> str | None:
        """Where the router is, if there is one."""
        return None if self.router_ip is None else with_scheme(f"{self.router_ip}:{self.router_port}")


def with_scheme(url: str) -> str:
    """`HOST:PORT` and `http://HOST:PORT/` as `http://HOST:PORT`."""
    return (url if "://" in url else f"http://{url}").rstrip("/")
