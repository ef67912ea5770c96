"""HTTP: what is a fault that may pass, what is none, and how a stream is read."""

import asyncio
import json
import socket

import pytest
from aiohttp import web
from miles_sglang.client import Client, LateError, MalformedError, PassingError, UnreachableError

from miles.api import EngineError


def with_server(answer, story, **options):
    """Run `story(client, url)` before a server that answers every request by `await answer(request)`."""

    async def whole():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        client = Client(**options)
        try:
            async with asyncio.timeout(10):
                return await story(client, f"http://127.0.0.1:{site.port}/generate")
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(whole())


def says(body, status=200):
    async def answer(request):
        return web.Response(body=body, status=status)

    return answer


def test_a_body_is_posted_and_without_one_it_is_asked():
    async def answer(request):
        return web.json_response([request.method, (await request.read()).decode(), request.headers.get("a")])

    async def story(client, url):
        assert await client.ask(url, {"a": [1, 2]}, headers={"a": "b"}) == ["POST", '{"a":[1,2]}', "b"]
        assert await client.ask(url) == ["GET", "", None]

    with_server(answer, story)


def test_a_key_goes_with_every_request():
    async def answer(request):
        return web.json_response(request.headers.get("Authorization"))

    async def story(client, url):
        return await client.ask(url, {})

    assert with_server(answer, story, api_key="secret") == "Bearer secret"
    assert with_server(answer, story) is None


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_of_a_server_that_may_answer_another_time(status):
    async def story(client, url):
        with pytest.raises(PassingError, match=f"status {status}: overloaded") as raised:
            await client.ask(url, {})
        assert raised.value.kind == "refused"

    with_server(says(b"overloaded", status), story)


@pytest.mark.parametrize("status", [400, 401, 404, 405, 422])
def test_statuses_of_a_server_that_never_will(status):
    async def story(client, url):
        with pytest.raises(EngineError, match="nonsense was asked") as raised:
            await client.ask(url, {})
        assert not isinstance(raised.value, PassingError)

    with_server(says(b"nonsense was asked", status), story)


@pytest.mark.parametrize(
    ("body", "quoted"),
    [(b"", "nothing"), (b"<html>", "<html>"), (b'{"a": [1, 2', "a.: .1, 2"), (b'{"a": NaN}', "NaN")],
)
def test_what_is_not_json(body, quoted):
    async def story(client, url):
        with pytest.raises(MalformedError, match=quoted):
            await client.ask(url, {})

    with_server(says(body), story)


def test_only_success_matters_to_whoever_tells():
    async def story(client, url):
        for body in (b"", b"Cache flushed.\n", b'{"success": true}', b'{"message": "paused"}'):
            said.append(says(body))
            await client.tell(url, {})
        said.append(says(b'{"success": false, "message": "no such file"}'))
        with pytest.raises(EngineError, match="no such file"):
            await client.tell(url, {})

    said = []
    with_server(lambda request: said[-1](request), story)


def test_an_answer_that_is_late():
    async def answer(request):
        await asyncio.sleep(5)

    async def story(client, url):
        with pytest.raises(LateError, match="within 0.05 s"):
            await client.ask(url, {}, timeout=0.05)

    with_server(answer, story)


def test_a_connection_that_breaks_and_one_that_is_not_made():
    async def answer(request):
        request.transport.abort()

    async def story(client, url):
        with pytest.raises(UnreachableError, match="broke off"):
            await client.ask(url, {})
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(UnreachableError):
                await client.ask(f"http://127.0.0.1:{unused.getsockname()[1]}/")

    with_server(answer, story)


# ------------------------------------------------------------------------------------------------------------- streams


def streams(*parts, end=True):
    """A server that writes these bytes one after the other."""

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if not end:
            request.transport.abort()
        return response

    return answer


def events(*parts, end=True):
    async def story(client, url):
        return [event async for event in client.events(url, {})]

    return with_server(streams(*parts, end=end), story)


def test_events_are_found_however_they_are_divided():
    long = json.dumps(list(range(100_000))).encode()
    whole = b'data: {"a": 1}\n\n: a comment\r\ndata: ' + long + b"\r\n\r\ndata: [DONE]\n\n"
    assert events(whole) == [{"a": 1}, list(range(100_000))]
    assert events(whole[:9], whole[9:17], whole[17:5000], whole[5000:-3], whole[-3:]) == events(whole)


def test_a_stream_that_ends_in_the_middle():
    with pytest.raises(MalformedError, match="in the middle"):
        events(b'data: {"a": 1}\n\n')
    with pytest.raises(UnreachableError):
        events(b'data: {"a": 1}\n\n', end=False)


def test_an_event_that_is_not_json():
    with pytest.raises(MalformedError, match="half"):
        events(b"data: {half\n\n")


def test_a_stream_that_is_refused():
    async def story(client, url):
        with pytest.raises(PassingError, match="503"):
            await anext(client.events(url, {}))

    with_server(says(b"", 503), story)
