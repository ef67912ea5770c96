"""The server of canned replies that scripts put in front of a real one."""

import asyncio
import base64
import json

from aiohttp import ClientSession, web
from canned_server import Canned
from fake_server import FakeSGLang, context, listening
from miles_sglang.engine import SGLangEngine
from miles_sglang.options import ExternalOptions
from story import CHECKPOINT, ask


def test_replies_carry_the_version_that_the_server_behind_it_has_now():
    """The engine itself gives a fresh server its version."""

    async def whole():
        (behind := FakeSGLang()).version = "default"
        async with asyncio.timeout(20), listening(behind):
            runner = web.ServerRunner(web.Server(Canned(behind.url, token=7)))
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{site.port}"
            engine = SGLangEngine(ExternalOptions(urls=[url], start_timeout=5), context=context())
            await engine.start()
            first = await engine.generate(ask())
            assert (first.tokens, first.weight_versions, behind.version) == ([7] * 4, [0] * 4, "0")
            behind.version = "1"
            await engine.receive("disk", 1, CHECKPOINT)
            assert (await engine.generate(ask())).weight_versions == [1] * 4
            await engine.close()
            async with ClientSession() as session, session.get(f"{url}/recorded") as answer:
                recorded = [json.loads(base64.b64decode(body)) for body in await answer.json()]
            await runner.cleanup()
        assert [body["input_ids"] for body in recorded] == [[10, 11, 12]] * 2
        assert not behind.called("/generate")

    asyncio.run(whole())
