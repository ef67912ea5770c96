"""A service on a port, for as long as nobody asks it to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from miles.api import ConfigError
from miles_serve.app import make_app
from miles_serve.service import Service

GRACE = 5.0
"""Seconds that requests have to end by themselves when the server is asked to stop."""
CLOSING = 2.0
"""Seconds for the last replies to be sent."""
STOPPING = (signal.SIGINT, signal.SIGTERM)


@asynccontextmanager
async def listening(service: Service, host: str, port: int, grace: float = GRACE) -> AsyncIterator[str]:
    """The address of a service that answers; on leaving, requests under way are answered or aborted.

    Args:
        port: 0 for one that is free.

    Raises:
        ConfigError: nobody can listen there.
    """
    runner = web.AppRunner(
        make_app(service), handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING, keepalive_timeout=60
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen there: {error.strerror or error}; choose another port "
                "(0 takes one that is free)"
            ) from error
        bound = runner.addresses[0][1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        await site.stop()
        await service.settle(grace)
    finally:
        await runner.cleanup()


async def until_stopped() -> signal.Signals:
    """The first SIGINT or SIGTERM. After it, a second one does what it does in any program."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    arrived: list[signal.Signals] = []

    def note(number: signal.Signals) -> None:
        arrived.append(number)
        stop.set()

    for number in STOPPING:
        loop.add_signal_handler(number, note, number)
    try:
        await stop.wait()
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)
    return arrived[0]
