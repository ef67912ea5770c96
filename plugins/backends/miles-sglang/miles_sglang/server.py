"""One SGLang server: started as a process of its own on GPUs of this one, watched, and ended with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from miles.api import EngineError
from miles_sglang.flags import Value, words
from miles_sglang.ports import HOST
from miles_sglang.process import GRACE, GuardedProcess
from miles_sglang.service import Service, installed

SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast is off, as in workers, unless the environment says otherwise."""
OF_TORCHRUN = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
ALLOCATORS = frozenset({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"})


class ServerProcess(Service):
    """`python -m sglang.launch_server`, on the GPUs that this process sees."""

    def __init__(
        self,
        arguments: Mapping[str, Value],
        log: Path,
        *,
        name: str = "the SGLang server",
        timeout: float,
        grace: float = GRACE,
    ):
        """
        Args:
            arguments: of the server, as `miles_sglang.arguments.server_arguments` gives them; ports are chosen here.
            timeout: seconds until it must be healthy.
            grace: seconds that it has to end by itself.

        Raises:
            EngineError: SGLang is not installed.
        """
        if not installed("sglang"):
            raise EngineError(
                'SGLang is not installed where the engine has to start a server: pip install "miles-sglang[server]", '
                "or use servers that run already, with --rollout-external"
            )
        super().__init__()
        self.timeout = timeout
        http, nccl = (port.number for port in self.ports)
        given = words({**arguments, "host": HOST, "port": http, "nccl_port": nccl})
        command = [sys.executable, "-m", "sglang.launch_server", *given]
        sleeps = arguments.get("enable_memory_saver") is True
        self.process = GuardedProcess(name, command, log, environment(os.environ, sleeps), grace)


def environment(ours: Mapping[str, str], sleeps: bool) -> dict[str, str]:
    """What a server finds: our variables, without those that speak of our own process group, in which it would look for
    a store that exists already, and without an allocator that its memory cannot be taken from while it sleeps."""
    kept = {
        name: value
        for name, value in ours.items()
        if name not in OF_TORCHRUN
        and not name.startswith("TORCHELASTIC_")
        and not (sleeps and name in ALLOCATORS and "expandable_segments" in value)
    }
    asleep = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1"} if sleeps else {}
    return {**SAFE, **asleep, **kept}
