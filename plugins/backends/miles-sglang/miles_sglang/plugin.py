"""Registers the engines `sglang` and `sglang_external`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.api import Component, ConfigError, hookimpl
from miles_sglang.options import ExternalOptions, SGLangOptions

MILES_API = 1
ENGINE = "miles_sglang.engine:SGLangEngine"


@hookimpl
def miles_configure(config: Any) -> None:
    """Refuse what would only come out when servers run, or not at all."""
    _refuse_tokens_of_unknown_version(config)
    _refuse_misread_model(config)


def _refuse_tokens_of_unknown_version(config: Any) -> None:
    """Of weights under frozen requests nobody could tell which tokens they made."""
    rollout, engine = config.rollout, config.rollout.engine
    frozen = rollout.mode == "fully_async" and rollout.pause_mode == "in_place"
    if frozen and engine.name.rpartition("/")[2].startswith("sglang") and not engine.options.get("stream"):
        raise ConfigError(
            "rollout.pause_mode: SGLang tells the version of the weights once for each answer, so with `in_place` it "
            "takes streams to know which tokens are older: set `stream: true` of rollout.engine (--sglang-stream; "
            "slower), or --pause-generation-mode retract"
        )


def _refuse_misread_model(config: Any) -> None:
    """Of servers that run already it is the engine that asks: they may be `miles serve`, which reads everything."""
    engine, model = config.rollout.engine, config.model
    if engine.name.rpartition("/")[2] != "sglang" or model.hf_checkpoint is None:
        return
    from miles_sglang.models import misread_checkpoint

    if fault := misread_checkpoint(model.hf_checkpoint, model.revision, engine.options.get("context_length")):
        raise ConfigError(f"model.hf_checkpoint={model.hf_checkpoint}: {fault}")


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
