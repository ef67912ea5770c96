"""Arguments as words of a command line, and which of them SGLang has. Light: options are checked with it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

Value = str | int | float | bool | None | list[Any] | tuple[Any, ...] | dict[str, Any]

ROUTER = "router_"
"""What begins so is an argument of the router."""
OURS = {
    "model_path": "it is the run's own: --hf-checkpoint",
    "model": "it is the run's own: --hf-checkpoint",
    "weight_version": "it is counted by weight syncs",
    "host": "servers listen where their engine is; --rollout-external uses servers that run already",
    "port": "a free one is found; --rollout-external uses servers that run already",
    "nccl_port": "a free one is found",
    "base_gpu_id": "a server gets GPUs of its engine (--rollout-num-gpus-per-engine)",
    "gpu_id_step": "a server gets GPUs of its engine (--rollout-num-gpus-per-engine)",
    "tensor_parallel_size": "write --sglang-tp-size",
    "incremental_streaming_output": "write --sglang-stream",
    "api_key": "servers listen on their own machine only",
    "admin_api_key": "servers listen on their own machine only",
    "ssl_keyfile": "servers listen on their own machine only",
    "ssl_certfile": "servers listen on their own machine only",
    "config": "write its lines as --sglang-... flags",
    "dp_size": "write --rollout-num-gpus-per-engine and a smaller --sglang-tp-size: several servers behind a router",
    "data_parallel_size": "write --rollout-num-gpus-per-engine and a smaller --sglang-tp-size",
    "pp_size": "weights are handed to tensor-parallel ranks only",
    "pipeline_parallel_size": "weights are handed to tensor-parallel ranks only",
    "nnodes": "an engine is on one node",
    "node_rank": "an engine is on one node",
    "dist_init_addr": "an engine is on one node",
    "disaggregation_mode": "prefill and decode happen in one server",
    "router_host": "the router listens where its servers are",
    "router_worker_urls": "they are the engine's own servers",
    "router_ip": "it names a running router, with --rollout-external",
    "router_port": "a free one is found; with --rollout-external it names a running router",
    "router_prometheus_port": "a free one is found",
}
"""Arguments that nobody else may set -> why, or what to write."""

SERVER: tuple[str, ...] = ("sglang", "srt/server_args.py", r"^    ([a-z]\w*): A\[", r"[\"']--([a-z][a-z0-9-]+)[\"']")
ROUTERS: tuple[str, ...] = ("sglang_router", "router_args.py", r"--\{prefix\}([a-z][a-z0-9-]+)[\"']")
"""Package, file, and patterns of what it says its arguments are."""


def words(arguments: Mapping[str, Value]) -> list[str]:
    """`{"mem_fraction_static": 0.7, "disable_cuda_graph": True}` as `--mem-fraction-static 0.7 --disable-cuda-graph`.

    True is a switch; False and None are left out; a list is several words, a mapping JSON.
    """
    said = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        said.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            said.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            said += [str(item) for item in value]
        elif value is not True:
            said.append(str(value))
    return said


def faults_of(arguments: Mapping[str, Value]) -> list[str]:
    """Of arguments that cannot be handed to SGLang: why not."""
    attends = bool(arguments.get("enable_dp_attention"))
    allowed = {"dp_size", "data_parallel_size"} if attends else set()
    return [said for name in arguments if name not in allowed and (said := _fault(name))]


def _fault(name: str) -> str:
    """Empty when it can be, or when nothing here can say."""
    flag = f"--sglang-{name.replace('_', '-')}"
    if name in OURS:
        return f"{flag} cannot be set: {OURS[name]}"
    package, bare, prefix = SERVER, name, "--sglang-"
    if name.startswith(ROUTER):
        package, bare, prefix = ROUTERS, name.removeprefix(ROUTER), "--sglang-router-"
    known = arguments_of(*package)
    if not known or bare in known:
        return ""
    near = get_close_matches(bare, known, n=1)
    hint = f"; did you mean {prefix}{near[0].replace('_', '-')}?" if near else ""
    return f"{flag} is no argument of the {package[0]} that is installed{hint}"


@cache
def arguments_of(package: str, file: str, *patterns: str) -> frozenset[str]:
    """Names that an installed package has for its arguments, with underscores; empty when it is not installed, or does
    not say them in the way that is known here.

    Read from its source: importing SGLang takes ten seconds and wants a GPU.
    """
    spec = importlib.util.find_spec(package)
    folders: Iterable[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
    sources = [path for folder in folders if (path := Path(folder, file)).is_file()]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    return frozenset(
        name.replace("-", "_") for text in texts for pattern in patterns for name in re.findall(pattern, text, re.M)
    )
