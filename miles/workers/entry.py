"""What a worker process does before anything is built in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from miles.config import Config
from miles.determinism import prepare_process
from miles.plugins import load_plugins
from miles.registry import Registry

_registries: list[Registry] = []
"""Of this process; at most one."""


def enter(config: Config, rank: int, provenance: Sequence[Mapping[str, Any]]) -> Registry:
    """Load the plugins anew, make sure that they are the driver's, and set seeds and threads. Whatever else is built in
    the process gets the same registry.

    Raises:
        PluginConflictError: other plugins are installed here than where the run was started.
    """
    if not _registries:
        plugins = load_plugins(block=config.plugins.block, require=config.plugins.require)
        plugins.verify(provenance)
        _registries.append(Registry(plugins))
        prepare_process(config.run, rank)
    return _registries[0]


def join_process_group(device: str, timeout: float) -> None:
    """torch.distributed's default group, from the environment that the executor set. Its own patience is twice the
    driver's, who can say more about a rank that hangs."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * timeout))
