"""Registers the executor `ray`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class RayOptions:
    """Which cluster, and what is asked of it."""

    address: str | None = None
    """`HOST:PORT` of a cluster to join, or `auto` for the one that was started on this machine. When neither it nor
    RAY_ADDRESS is given, a cluster is started here and ends with the run."""
    cpus_per_worker: float = 0.01
    """CPUs that Ray counts for each worker. It limits how many workers fit, not how much they compute; next to nothing,
    so that a machine with few cores can have as many ranks as GPUs."""
    placement_timeout: float = 120.0
    """Seconds to wait for the cluster to have room."""
    env: tuple[str, ...] = ()
    """Environment variables that workers get from the driver, besides those that libraries are set up with. Ray keeps
    their values in plain text."""

    def preflight(self) -> None:
        """Raises ConfigError: nobody can join a cluster by this address."""
        refuse_clients(self.address)


def refuse_clients(address: str | None) -> None:
    """Raises ConfigError: the address is for clients outside of the cluster."""
    if address and "://" in address:
        raise ConfigError(
            f"ray cannot use {address}: that is the way in for clients outside of the cluster. Run "
            "miles on a machine of the cluster, with --ray-address HOST:6379 (as `ray start` prints it) or auto"
        )


@hookimpl
def miles_register_executors() -> Mapping[str, Component]:
    return {
        "ray": Component(
            "miles_ray.executor:RayExecutor",
            options=RayOptions,
            flags={"--ray-address": "address"},
            summary="Workers are actors of a Ray cluster, on one machine or many",
        )
    }
