"""A web application on a port, for as long as nobody asks it to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

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
    """The address of a service that answers; on leaving, requests under way are answered or aborted. See `bound`."""
    async with bound(make_app(service), host, port, partial(service.settle, grace)) as url:
        yield url


@asynccontextmanager
async def bound(
    app: web.Application, host: str, port: int, settle: Callable[[], Awaitable[None]]
) -> AsyncIterator[str]:
    """The address of an application that answers.

    Args:
        port: 0 for one that is free.
        settle: on leaving, when nobody comes in any more, ends the requests under way.

    Raises:
        ConfigError: nobody can listen there.
    """
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSING, keepalive_timeout=60
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"host {host}, port {port}: cannot listen there: {error.strerror or error}; choose another port (0 "
                "takes one that is free)"
            ) from error
        taken = runner.addresses[0][1]
        yield f"http://{f'[{host}]' if ':' in host else host}:{taken}"
        await site.stop()
        await settle()
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
