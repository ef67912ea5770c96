"""Registers the engines `sglang` and `sglang_external`."""

from __future__ import annotations

from collections.abc import Mapping

from miles.api import Component, hookimpl
from miles_sglang.options import ExternalOptions, SGLangOptions

MILES_API = 1
ENGINE = "miles_sglang.engine:SGLangEngine"


@hookimpl
def miles_register_rollout_engines() -> Mapping[str, Component]:
    return {
        "sglang": Component(
            ENGINE,
            options=SGLangOptions,
            provides=("responses", "several gpus"),
            summary="SGLang servers that the run starts; --sglang-ARGUMENT VALUE is an argument of theirs",
        ),
        "sglang_external": Component(
            ENGINE,
            options=ExternalOptions,
            provides=("responses", "elsewhere"),
            flags={
                "--rollout-external": "",
                "--rollout-external-engine-addrs": "urls",
                "--sglang-router-ip": "router_ip",
                "--sglang-router-port": "router_port",
            },
            summary="SGLang servers that run already; weights reach them by disk",
        ),
    }
