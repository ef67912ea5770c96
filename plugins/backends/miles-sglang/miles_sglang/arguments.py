"""From a run's options to the arguments of one server."""

from __future__ import annotations

from typing import Any

from miles.api import EngineContext, EngineError
from miles_sglang.flags import ROUTER, Value
from miles_sglang.options import SGLangOptions

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
NO_FP32 = (
    "SGLang's kernels for GPUs take bf16, not fp32: --train-dtype bf16. To train in fp32 nevertheless, say "
    "--sglang-dtype bfloat16, and how far apart engine and trainer may be: --weight-sync-tolerance 0.15, as for bf16. "
    "(Where your SGLang can do it: --sglang-dtype float32.)"
)
"""Its RMSNorm (0.5.17) "failed to dispatch data type Float", a minute into the start."""
SHARED_AWAKE, SHARED_ASLEEP = 0.4, 0.7
"""Of the memory that is free when a server starts, for its weights and cache, where a trainer works on the same GPU.
0.7 where they take turns: gradients and optimizer are gone then, but the trainer's weights stay beside the server's
while these are brought up to date. 0.4 where both stay. A server alone takes what SGLang finds right (near 0.9)."""


def server_arguments(options: SGLangOptions, context: EngineContext, tp_size: int, index: int = 0) -> dict[str, Value]:
    """Arguments of server `index` of an engine, but for its ports. What the user wrote comes last and wins.

    Raises:
        EngineError: SGLang does not compute in this type, or not on this device.
    """
    if context.dtype not in DTYPES:
        raise EngineError(f"SGLang computes in {' or '.join(DTYPES)}, not in {context.dtype} (--train-dtype)")
    given: dict[str, Any] = {n: v for n, v in (options.model_extra or {}).items() if not n.startswith(ROUTER)}
    if context.dtype == "fp32" and "dtype" not in given and not context.device.startswith("cpu"):
        raise EngineError(NO_FP32)
    if isinstance(given.get("random_seed"), int):  # servers with one seed would draw the same
        given["random_seed"] += context.rank * (context.gpus // tp_size) + index
    sleeps = given.get("enable_memory_saver", context.sleeps)
    return {
        "model_path": str(context.checkpoint),
        "dtype": DTYPES[context.dtype],
        "load_format": "auto" if context.load_weights else "dummy",
        "skip_tokenizer_init": context.tokenizer is None,
        "tp_size": tp_size,
        "base_gpu_id": first_gpu(context) + index * tp_size,
        "mem_fraction_static": (SHARED_ASLEEP if context.sleeps else SHARED_AWAKE) if context.shares else None,
        "enable_memory_saver": sleeps,
        # Graphs of prefill are `breakable` by default, and a server with these does not start where graphs can sleep.
        "cuda_graph_backend_prefill": "disabled" if sleeps else None,
        "enable_return_routed_experts": context.routed_experts,
        "incremental_streaming_output": options.stream,
        "weight_version": "0",
        "log_level_http": "warning",
        **given,
    }


def first_gpu(context: EngineContext) -> int:
    """Of an engine; the others follow it."""
    return int(context.device.partition(":")[2] or 0)


def router_arguments(options: SGLangOptions) -> dict[str, Value]:
    """Arguments of the router that the user wrote, as `--sglang-router-...`."""
    extra = options.model_extra or {}
    return {name.removeprefix(ROUTER): value for name, value in extra.items() if name.startswith(ROUTER)}
