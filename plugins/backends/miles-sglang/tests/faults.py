"""A reverse proxy that spoils what passes through it: a network and a server on their bad days, by a plan.

It stands between an engine and its server. Which requests of one path suffer what, a plan says: a function of what is
asked and of how often it was asked before, so that a seed repeats a whole bad day whatever came in which order. All
else passes as it is. It keeps a record of every request, to compare with what engine and server say.

    async with FaultyProxy(server.url, RandomPlan(seed=1, share=0.1)) as proxy:
        ...                                      # an engine at proxy.url
    proxy.counts[Fault.RESET]
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
from aiohttp import web

GENERATE = "/generate"
GATEWAY_PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
RESET_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset and drops what was not sent."""


class Fault(StrEnum):
    """What happens to one delivery of a request."""

    # The server never sees it.
    REFUSED = "refused"
    """Its connection is closed, and for a moment nobody listens."""
    ERROR_500 = "500"
    ERROR_503 = "503, empty"
    BUSY_429 = "429"
    REJECTED_400 = "400"
    """Not a fault that may pass: the next try would hear the same."""
    # The server works on it, and nobody hears what it makes.
    HUNG_UP = "hung up"
    """The connection closes while the server is at work."""
    GATEWAY_504 = "504"
    """A gateway loses its patience; the server does not."""
    SLOW = "slow"
    """The answer comes `delay` seconds late."""
    # The server's answer is spoilt on its way.
    RESET = "reset"
    """The connection is reset in the middle of it."""
    EMPTY = "empty"
    TRUNCATED = "truncated"
    """Half of it, as if that were all."""
    HTML = "html"
    NO_META = "no meta_info"
    NO_LOG_PROBS = "no log-probs"
    FEWER_LOG_PROBS = "fewer log-probs"
    """One fewer than there are tokens."""
    FOREIGN = "foreign"
    """The answer to somebody else's request."""
    BEYOND_VOCABULARY = "beyond the vocabulary"
    # Only the server notices.
    TWICE = "twice"
    """It is delivered two times at once, as by a middle box that retries by itself; the better answer is passed on."""


FINAL = frozenset({Fault.REJECTED_400})
UNSEEN = frozenset({Fault.REFUSED, Fault.ERROR_500, Fault.ERROR_503, Fault.BUSY_429, *FINAL})
LOST = frozenset({Fault.HUNG_UP, Fault.GATEWAY_504, Fault.SLOW})
HARMLESS = frozenset({Fault.TWICE})
SPOILT = frozenset(Fault) - UNSEEN - LOST - HARMLESS
PASSING = tuple(fault for fault in Fault if fault not in FINAL | HARMLESS)
"""After these another try may succeed."""

Plan = Callable[[str, int], Fault | None]
"""What is asked (the request without its id), and how often it came before: the fault that it meets."""


def first(*faults: Fault) -> Plan:
    """The first deliveries of every request meet these; then all is well."""
    return lambda asked, earlier: faults[earlier] if earlier < len(faults) else None


def once(*faults: Fault) -> Plan:
    """The first deliveries of all meet these, whatever they are."""
    left = list(faults)
    return lambda asked, earlier: left.pop(0) if left else None


def always(fault: Fault) -> Plan:
    return lambda asked, earlier: fault


@dataclass(frozen=True)
class RandomPlan:
    """A share of all deliveries meets one of `faults`, each as often as the others."""

    seed: int
    share: float
    faults: Sequence[Fault] = (*PASSING, *HARMLESS)

    def __call__(self, asked: str, earlier: int) -> Fault | None:
        digest = hashlib.blake2b(f"{self.seed}:{earlier}:{asked}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / 2**64 / self.share
        return self.faults[int(drawn * len(self.faults))] if drawn < 1 else None


@dataclass
class Record:
    """One request for tokens, however often it was tried."""

    body: dict[str, Any]
    """As it came first."""
    rids: list[str] = field(default_factory=list)
    """Of each try."""
    fates: list[Fault | None] = field(default_factory=list)
    """Of each try; None: nothing happened to it."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Those that arrived whole."""


class FaultyProxy:
    """Listens on a port of its own while its `async with` lasts."""

    def __init__(
        self,
        target: str,
        plan: Plan,
        *,
        path: str = GENERATE,
        delay: float = 1.0,
        closed: float = 0.02,
        beyond: int = 10**6,
    ):
        """
        Args:
            path: of requests that may suffer.
            delay: seconds that an answer of a slow server is late.
            closed: seconds for which nobody listens.
            beyond: a token outside the vocabulary.
        """
        self.target, self.plan, self.path = target, plan, path
        self.delay, self.closed, self.beyond = delay, closed, beyond
        self.counts: Counter[Fault] = Counter()
        self.records: dict[str, Record] = {}
        self.passed: Counter[str] = Counter()
        """Requests that reached the server, by path."""
        self.aborted: list[str] = []
        """Ids of requests that the client asked the server to end."""
        self._last: dict[str, Any] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._on_their_way: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> FaultyProxy:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._session = aiohttp.ClientSession(self.target, connector=aiohttp.TCPConnector(limit=0))
        self._port = 0
        await self._listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Break every connection; nobody listens any more."""
        if self._opening is not None:
            await self._opening
        await self._runner.cleanup()
        for task in self._on_their_way:
            task.cancel()
        await self._session.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=1024)
        await self._site.start()
        self._port = self._site.port

    async def _close_for_a_moment(self) -> None:
        await self._site.stop()
        await asyncio.sleep(self.closed)
        await self._listen()

    # ------------------------------------------------------------------------------------------- one request

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        if request.path != self.path:
            if request.path == "/abort_request":
                self.aborted.append(json.loads(data).get("rid", ""))
            return await self._passed_on(request, data)
        body = json.loads(data)
        asked = json.dumps({name: value for name, value in body.items() if name != "rid"}, sort_keys=True)
        record = self.records.setdefault(asked, Record(body))
        fault = self.plan(asked, len(record.fates))
        record.rids.append(body.get("rid", ""))
        record.fates.append(fault)
        if fault is not None:
            self.counts[fault] += 1
        if fault in UNSEEN:
            return self._turned_away(request, fault)
        if fault in (Fault.HUNG_UP, Fault.GATEWAY_504):
            await self._left_alone(request, data)
            return _cut(request) if fault is Fault.HUNG_UP else web.Response(status=504, text="upstream timed out")
        if fault is None and body.get("stream"):
            return await self._passed_on(request, data)
        answer = await (self._delivered_twice(request, data) if fault is Fault.TWICE else self._asked(request, data))
        if fault is Fault.SLOW:
            await asyncio.sleep(self.delay)
        if fault in SPOILT and not _has_left(request):
            return await self._spoilt(request, fault, answer)
        if answer.status == 200 and fault in (None, *HARMLESS) and not _has_left(request):
            self._last = json.loads(answer.body)
            record.answers.append(self._last)
        return answer.response() if answer.status else _cut(request)

    def _turned_away(self, request: web.Request, fault: Fault) -> web.Response:
        if fault is Fault.ERROR_500:
            return web.json_response({"error": {"message": "the scheduler is unwell"}}, status=500)
        if fault is Fault.ERROR_503:
            return web.Response(status=503)
        if fault is Fault.BUSY_429:
            return web.Response(status=429, text="slow down", headers={"Retry-After": "0"})
        if fault is Fault.REJECTED_400:
            return web.json_response({"error": {"message": "that cannot be done"}}, status=400)
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._close_for_a_moment())
        return _cut(request)

    async def _spoilt(self, request: web.Request, fault: Fault, answer: Answer) -> web.StreamResponse:
        if fault is Fault.RESET:
            broken = web.StreamResponse(headers={"Content-Length": str(len(answer.body))})
            await broken.prepare(request)
            await broken.write(answer.body[: len(answer.body) // 2])
            return _cut(request)
        if fault is Fault.HTML:
            return web.Response(body=GATEWAY_PAGE, content_type="text/html")
        if fault in (Fault.EMPTY, Fault.TRUNCATED):
            half = len(answer.body) // 2 if fault is Fault.TRUNCATED else 0
            return web.Response(body=answer.body[:half], content_type="application/json")
        if answer.status != 200:
            return answer.response() if answer.status else _cut(request)
        return web.json_response(self._altered(fault, json.loads(answer.body)))

    def _altered(self, fault: Fault, said: dict[str, Any]) -> dict[str, Any]:
        meta = said["meta_info"]
        if fault is Fault.NO_META:
            del said["meta_info"]
        elif fault is Fault.NO_LOG_PROBS:
            meta.pop("output_token_logprobs", None)
        elif fault is Fault.FEWER_LOG_PROBS:
            meta["output_token_logprobs"] = meta["output_token_logprobs"][:-1]
        elif fault is Fault.BEYOND_VOCABULARY:
            said["output_ids"][-1] = self.beyond
            meta["output_token_logprobs"][-1][1] = self.beyond
        elif fault is Fault.FOREIGN:
            return self._last or {**said, "meta_info": {**meta, "id": "somebody else's"}}
        return said

    # ------------------------------------------------------------------------------------------ to the server

    async def _asked(self, request: web.Request, data: bytes) -> Answer:
        self.passed[request.path] += 1
        try:
            async with self._sent(request, data) as reply:
                return Answer(reply.status, await reply.read(), reply.content_type)
        except aiohttp.ClientError:  # the server is gone: the client learns it as it would without a proxy
            return Answer(0, b"", "")

    async def _delivered_twice(self, request: web.Request, data: bytes) -> Answer:
        answers = await asyncio.gather(self._asked(request, data), self._asked(request, data))
        return min(answers, key=lambda answer: abs(answer.status - 200))

    async def _left_alone(self, request: web.Request, data: bytes) -> None:
        """Send a request whose answer nobody waits for; return when the server has had time to begin."""
        task = asyncio.create_task(self._asked(request, data))
        self._on_their_way.add(task)
        task.add_done_callback(self._on_their_way.discard)
        await asyncio.wait([task], timeout=self.closed)

    async def _passed_on(self, request: web.Request, data: bytes) -> web.StreamResponse:
        """Piece by piece, as it comes."""
        self.passed[request.path] += 1
        try:
            async with self._sent(request, data) as reply:
                response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
                await response.prepare(request)
                async for piece in reply.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except aiohttp.ClientError:
            return _cut(request)

    def _sent(self, request: web.Request, data: bytes) -> Any:
        headers = {"Content-Type": request.content_type}
        if authorization := request.headers.get("Authorization"):
            headers["Authorization"] = authorization
        return self._session.request(request.method, request.path_qs, data=data, headers=headers)


@dataclass(frozen=True)
class Answer:
    """What the server said; status 0 where it said nothing."""

    status: int
    body: bytes
    content_type: str

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, content_type=self.content_type)


def _has_left(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _cut(request: web.Request) -> web.Response:
    """Reset the connection of a request. What is returned reaches nobody."""
    if request.transport is not None:
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
        request.transport.abort()
    return web.Response()
