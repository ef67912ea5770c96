"""The retrieval server: an index over HTTP, with the API of search-r1's.

    POST /retrieve   {"queries": ["..."], "topk": 3, "return_scores": true}
                     {"result": [[{"document": {"id": "...", "contents": "..."}, "score": 0.83}, ...]]}
    GET /health      {"passages": 2000, "model": "wordllama"}

Without `return_scores` the documents stand in the lists themselves. Queries that come while others are embedded and
searched wait, and are then answered together: one pass of the model for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from miles_search_r1.index import Index

LARGEST_BODY = 16 * 1024**2
MOST_QUERIES = 4096
MOST_PASSAGES = 1000
Hits = list[tuple[float, dict[str, Any]]]


class RetrieveBody(BaseModel):
    """What clients send."""

    queries: Annotated[list[str], Field(max_length=MOST_QUERIES)]
    topk: Annotated[int | None, Field(ge=1, le=MOST_PASSAGES)] = None
    return_scores: bool = False


class Waiting(NamedTuple):
    queries: Sequence[str]
    topk: int
    answer: asyncio.Future[list[Hits]]


class Batcher:
    """Searches of many clients, one batch after the other in a thread.

    Args:
        max_batch_size: queries that are embedded at once; a larger request is a batch of its own.
    """

    def __init__(self, index: Index, max_batch_size: int = 256):
        self.index, self.max_batch_size = index, max_batch_size
        self.batches = 0
        self._waiting: deque[Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        if not queries:
            return []
        answer: asyncio.Future[list[Hits]] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(queries, topk, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            queries = [query for waiting in batch for query in waiting.queries]
            self.batches += 1
            try:
                hits = iter(await asyncio.to_thread(self.index.search, queries, max(w.topk for w in batch)))
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            for waiting in batch:
                found = [next(hits)[: waiting.topk] for _ in waiting.queries]
                if not waiting.answer.done():  # whoever asked may have gone
                    waiting.answer.set_result(found)

    def _next_batch(self) -> list[Waiting]:
        batch = [self._waiting.popleft()]
        room = self.max_batch_size - len(batch[0].queries)
        while self._waiting and len(self._waiting[0].queries) <= room:
            batch.append(self._waiting.popleft())
            room -= len(batch[-1].queries)
        return batch


def make_app(index: Index, topk: int = 3, max_batch_size: int = 256) -> web.Application:
    """The application.

    Args:
        topk: passages where a request does not say how many.
    """
    batcher = Batcher(index, max_batch_size)

    async def retrieve(request: web.Request) -> web.Response:
        try:
            body = RetrieveBody.model_validate_json(await request.read())
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            return web.json_response({"error": faults}, status=400)
        found = await batcher.search(body.queries, body.topk or topk)
        if body.return_scores:
            result: Any = [[{"document": row, "score": score} for score, row in hits] for hits in found]
        else:
            result = [[row for _, row in hits] for hits in found]
        return web.json_response({"result": result})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"passages": len(index), "model": index.embedding.model, "batches": batcher.batches})

    app = web.Application(client_max_size=LARGEST_BODY)
    app.add_routes([web.post("/retrieve", retrieve), web.get("/health", health)])
    return app


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """The address of an application that answers. A port of 0 takes one that is free.

    Raises:
        OSError: the port is taken.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        host, port = runner.addresses[0][:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        await runner.cleanup()
