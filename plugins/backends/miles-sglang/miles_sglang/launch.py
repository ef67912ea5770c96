"""The servers that an engine starts, and the router in front of them where there are several."""

from __future__ import annotations

from miles.api import EngineContext, EngineError
from miles_sglang.arguments import first_gpu, router_arguments, server_arguments
from miles_sglang.options import SGLangOptions
from miles_sglang.router import RouterProcess
from miles_sglang.server import ServerProcess


def own_servers(options: SGLangOptions, context: EngineContext) -> tuple[list[ServerProcess], RouterProcess | None]:
    """Servers on the GPUs of an engine, `tp_size` GPUs each; none runs yet.

    Raises:
        EngineError: the GPUs cannot be divided so, or SGLang or its router is not installed.
    """
    gpus, tp_size = context.gpus, options.tp_size or context.gpus
    if gpus % tp_size:
        raise EngineError(
            f"an engine of {gpus} GPUs cannot be divided into servers of {tp_size}: give a --sglang-tp-size that "
            f"divides --rollout-num-gpus-per-engine {gpus}"
        )
    count, logs, engine = gpus // tp_size, context.run_dir / "logs", f"sglang-{context.rank}"
    names = [engine] if count == 1 else [f"{engine}-{index}" for index in range(count)]
    servers = [
        ServerProcess(
            server_arguments(options, context, tp_size, index),
            logs / f"{name}.log",
            name=f"SGLang server {name}",
            timeout=options.start_timeout,
        )
        for index, name in enumerate(names)
    ]
    if count == 1:
        return servers, None
    urls, name = [server.url for server in servers], f"{engine}-router"
    return servers, RouterProcess(urls, logs / f"{name}.log", router_arguments(options), name=f"SGLang router {name}")


def homes(context: EngineContext, servers: int) -> list[list[str]]:
    """The device of each rank of each server, in the order in which `server_arguments` gives them out."""
    kind, first, ranks = context.device.partition(":")[0], first_gpu(context), context.gpus // servers
    each = [kind if kind == "cpu" else f"{kind}:{first + gpu}" for gpu in range(context.gpus)]
    return [each[server * ranks : (server + 1) * ranks] for server in range(servers)]
