"""Ports for servers: chosen here, and nobody else is given one while it is kept."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"
"""Servers speak to the engine beside them, and to nobody else."""


class Port:
    """A free port of this machine, reserved until it is closed.

    A socket stays bound to it without listening. With SO_REUSEADDR on both sides, as servers set it, a listener may
    join it there, while the kernel gives the port to nobody who asks for any. So servers that start at once in several
    processes never get the same.
    """

    def __init__(self) -> None:
        self._held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._held.bind((HOST, 0))
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.number: int = self._held.getsockname()[1]

    def close(self) -> None:
        self._held.close()
