"""Server-sent events: JSON objects to a client, one by one."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    """The reply to one request. It starts with its first event: until then, an error still has a status of its own."""

    def __init__(self, request: web.Request):
        self.request = request
        self.response = web.StreamResponse(headers=HEADERS)

    @property
    def started(self) -> bool:
        return self.response.prepared

    async def send(self, event: dict[str, Any]) -> None:
        """Raises ConnectionError when the client has left."""
        await self._write(json.dumps(event, ensure_ascii=False))

    async def done(self) -> web.StreamResponse:
        await self._write("[DONE]")
        await self.response.write_eof()
        return self.response

    async def _write(self, data: str) -> None:
        if not self.started:
            await self.response.prepare(self.request)
        await self.response.write(f"data: {data}\n\n".encode())
