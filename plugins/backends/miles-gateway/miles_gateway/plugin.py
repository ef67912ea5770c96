"""Registers the generate function `agent`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, hookimpl
from miles_gateway.options import AgentOptions

MILES_API = 1


@hookimpl
def miles_register_generate_functions() -> Mapping[str, Component]:
    return {
        "agent": Component(
            "miles_gateway.agent:Agent",
            options=AgentOptions,
            provides=("--custom-agent-function-path",),
            flags={
                "--use-session-server": "",
                "--custom-agent-function-path": "function",
                "--session-server-ip": "host",
                "--session-server-port": "port",
            },
            summary="A function of yours that speaks to the model over OpenAI's chat API",
        )
    }
