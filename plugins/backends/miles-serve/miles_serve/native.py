"""SGLang's own HTTP API."""

from __future__ import annotations

from aiohttp import web

from miles_serve.service import Service


def routes(service: Service) -> list[web.RouteDef]:
    async def health(request: web.Request) -> web.Response:
        await service.engine.health()
        return web.Response()

    return [web.get("/health", health)]
