"""SGLang's router in front of several servers of one engine: `sglang_router`, a package of its own (0.3.2).

What is particular to it:

- It reads a request into fields that it knows and drops the rest: `return_routed_experts`, `routed_experts_start_len`
  and `return_sampling_mask` never arrive. Requests that need one of these go to a server directly.
- Its policy `cache_aware` looks at text. Of requests that are token ids, all go to one server until that has 64 more
  than another. `manual` keeps requests of one key together, where the cache has what they share, and gives new keys to
  the server with the fewest: that is the default here, with the key in the header `ROUTING_KEY`.
- It retries by itself, under the same request id. That is off: the engine does it, under ids of its own.
- It asks servers for their /health, for which these generate a token, asleep or not: one whose memory was released
  would die of it (reading). That is off: the engine watches its servers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from miles.api import EngineError
from miles_sglang.flags import Value, words
from miles_sglang.ports import HOST
from miles_sglang.process import GuardedProcess
from miles_sglang.service import Service, installed

ROUTING_KEY = "x-smg-routing-key"
"""Header: requests with equal values go to one server."""
DROPPED = frozenset({"return_routed_experts", "routed_experts_start_len", "return_sampling_mask"})
"""Fields of a request that it does not pass on."""
START_TIMEOUT = 60.0
"""Seconds until it must have found its servers, which are healthy when it starts."""
DEFAULTS: Mapping[str, Value] = {
    "policy": "manual",
    "assignment_mode": "min_group",
    "disable_retries": True,
    "disable_circuit_breaker": True,
    "disable_health_check": True,
    "request_timeout_secs": 24 * 3600,
    "shutdown_grace_period_secs": 1,
    "log_level": "warn",
}
"""How long a request may take, and when a server is given up, is the engine's to decide."""


class RouterProcess(Service):
    """`python -m sglang_router.launch_router`."""

    def __init__(
        self,
        servers: Sequence[str],
        log: Path,
        arguments: Mapping[str, Value] | None = None,
        *,
        name: str = "the SGLang router",
    ):
        """
        Args:
            servers: their urls.
            arguments: of the router, besides the defaults and what is chosen here.

        Raises:
            EngineError: the router is not installed.
        """
        if not installed("sglang_router"):
            raise EngineError(
                f"{len(servers)} servers of one engine need a router, which is not installed: pip install "
                "sglang-router, or give one server all GPUs of the engine (leave --sglang-tp-size out)"
            )
        super().__init__()
        self.timeout, self.servers = START_TIMEOUT, list(servers)
        port, metrics = (port.number for port in self.ports)
        chosen: dict[str, Value] = {"host": HOST, "port": port, "prometheus_host": HOST, "prometheus_port": metrics}
        given = words({**DEFAULTS, **(arguments or {}), **chosen, "worker_urls": self.servers})
        command = [sys.executable, "-m", "sglang_router.launch_router", *given]
        self.process = GuardedProcess(name, command, log)

    async def ready(self, session: aiohttp.ClientSession) -> bool:
        """Whether it has found all its servers."""
        async with session.get(f"{self.url}/readiness") as reply:
            return reply.status == 200 and (await reply.json())["healthy_workers"] == len(self.servers)
