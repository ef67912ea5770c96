"""The Ray cluster that this process is part of: one that runs already, or one that is started here."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from miles.api import WorkerError
from miles_ray.plugin import refuse_clients

TOKEN_HINT = """
A cluster that was started where ~/.ray/auth_token exists wants that token, and Ray does not show it to an address that
is given: set RAY_AUTH_MODE=token here, with the token in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says."""


def join(address: str | None, log_to_driver: bool) -> tuple[Callable[[], None], bool]:
    """Connect this process to a cluster.

    To be called in a thread that lasts: the kernel ends Ray's processes with the thread that started them, which is
    what makes them go when the driver is killed.

    Args:
        address: of the cluster; None to start one on this machine.

    Returns:
        What leaves the cluster again, and ends it if it was started here; and whether it was.

    Raises:
        ConfigError: the address cannot be used.
        WorkerError: Ray did not start or refused this process.
    """
    if ray.is_initialized():  # by somebody else, who goes on with it
        return lambda: None, False
    address = address or os.environ.get("RAY_ADDRESS") or None
    refuse_clients(address)
    with _signals_kept():
        try:
            ray.init(
                address or "local",
                include_dashboard=False,
                log_to_driver=log_to_driver,
                logging_level=logging.ERROR,
                _system_config=None if address else {"worker_niceness": 0},  # 15 by Ray: after everything else
            )
        except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            doing = f"join the Ray cluster at {address}" if address else "start a Ray cluster on this machine"
            hint = "" if not address or os.environ.get("RAY_AUTH_MODE") else TOKEN_HINT
            raise WorkerError(f"cannot {doing}: {error}{hint}") from error
    return ray.shutdown, not address


@contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM asks a run to stop at a safe place, for which it needs its workers. Ray takes it for itself; and the
    processes it starts, which are in the driver's process group, would end when all of that get it (`timeout` and batch
    systems do so): they inherit that it is blocked."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
