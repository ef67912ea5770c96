"""Servers of this machine for searches: made-up ones that answer as a test says, and the real one."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web
from miles_search_r1.server import listening

PASSAGES = (
    ("Amber Falcon", "The inn Amber Falcon is in Dunmore."),
    ("Amber Otter", "The inn Amber Otter is in Velby."),
    ("Silver Falcon", "The inn Silver Falcon is in Harrow."),
    ("Merry Badger", "The inn Merry Badger is in Tolmere."),
)


@contextmanager
def in_a_thread(app, port=0):
    """The address of an application that runs in a thread."""
    loop, ready, stopped = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address = []

    async def serve():
        async with listening(app, "127.0.0.1", port) as url:
            address.append(url)
            ready.set()
            await stopped.wait()

    def work():
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(30)
        loop.close()


class Scripted:
    """Answers each request with the next reply of a list, the last one again and again: (status, text or JSON), or a
    function of the request's JSON. Keeps what it was asked."""

    def __init__(self, *replies, seconds=0.0):
        self.replies, self.seconds = list(replies), seconds
        self.asked, self.headers = [], []

    async def handle(self, request):
        self.asked.append(await request.json())
        self.headers.append(dict(request.headers))
        await asyncio.sleep(self.seconds)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        status, body = (200, reply(self.asked[-1])) if callable(reply) else reply
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    def app(self):
        app = web.Application()
        app.add_routes([web.post("/{path:.*}", self.handle)])
        return app


@pytest.fixture(scope="session")
def serving():
    """(application, port, 0 for a free one) -> its address, for as long as a `with` lasts."""
    return in_a_thread


@pytest.fixture(scope="session")
def scripted_app():
    """Replies -> an application that gives them."""
    return lambda *replies: Scripted(*replies).app()


@pytest.fixture
def scripted():
    """Replies -> (the server, its address)."""
    opened = []

    def start(*replies, **how):
        server = Scripted(*replies, **how)
        context = in_a_thread(server.app())
        opened.append(context)
        return server, context.__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": str(i), "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(PASSAGES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
