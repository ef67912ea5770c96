"""Options of the generate function `agent`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.api import ConfigError

HERE = ("127.0.0.1", "localhost", "::1")
LARGEST_PORT = 65535


@dataclass(frozen=True)
class AgentOptions:
    """The agent, and where its sessions are."""

    function: str
    """The agent, as `my_module:my_agent` (or `my_module.my_agent`): `async def my_agent(base_url, prompt,
    request_kwargs, metadata, **kw) -> dict | None`, or the same without `async`, which then runs in a thread."""
    host: str = "127.0.0.1"
    """Where the server listens. Elsewhere than on this machine it needs a key."""
    port: int = 0
    """0 takes one that is free."""
    address: str | None = None
    """Host under which agents reach the server, where that is not `host`."""
    api_key_variable: str | None = None
    """Environment variable with the key that clients have to send as `Authorization: Bearer KEY`."""
    timeout: float | None = None
    """Seconds that an agent may take; the sample fails after that. Without it an agent ends by itself."""
    threads: int = 256
    """Agents that are no coroutines and may run at once."""
    other_sampling: Literal["ignore", "refuse"] = "ignore"
    """What becomes of a request that asks for another temperature, `top_p`, `top_k`, `min_p`, `min_tokens` or seed than
    the task set's, which is what training reckons with: it is answered with the task set's, or with an error."""

    def __post_init__(self) -> None:
        if not self.function.replace(":", ".").strip(".").count("."):
            raise ConfigError(f"agent: function {self.function!r} names no function; write my_module:my_agent")
        if not 0 <= self.port <= LARGEST_PORT:
            raise ConfigError(f"agent: port={self.port} must be from 0 (one that is free) to {LARGEST_PORT}")
        if self.host not in HERE and self.api_key_variable is None:
            raise ConfigError(
                f"agent: host={self.host!r} is reached from other machines, and everybody there could use the model: "
                "name an environment variable that holds a key with api_key_variable"
            )
        if self.timeout is not None and self.timeout <= 0:
            raise ConfigError(f"agent: timeout={self.timeout} must be positive")
        if self.threads < 1:
            raise ConfigError(f"agent: threads={self.threads} must be at least 1")

    def preflight(self) -> None:
        """The agent is there and can be called, and so is the key."""
        from miles_gateway.agent import Agent

        Agent(self)

    @property
    def target(self) -> str:
        """`function` with a colon before the last name."""
        module, _, name = self.function.rpartition("." if ":" not in self.function else ":")
        return f"{module}:{name}"
