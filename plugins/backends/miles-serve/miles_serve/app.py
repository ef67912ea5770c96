"""The web application: both APIs over one service, and how errors look from outside."""

from __future__ import annotations

from aiohttp import web

from miles_serve import native
from miles_serve.service import Service

BODY_LIMIT = 256 * 1024**2
"""Bytes of the largest request that is read."""


def make_app(service: Service) -> web.Application:
    """To be run with `handler_cancellation=True`, so that a client that leaves takes its requests along."""
    app = web.Application(client_max_size=BODY_LIMIT)
    app.add_routes(native.routes(service))
    return app
