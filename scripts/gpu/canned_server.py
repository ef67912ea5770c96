"""A server that answers SGLang's `/generate` at once, with as many tokens as asked for: what is left is the client.

    python scripts/gpu/canned_server.py --port 31900 [--upstream http://127.0.0.1:31000]

Everything else is answered by the `upstream` server, if there is one, so that an engine sends here what it would send
there. `GET /recorded` gives the bodies of requests since it was last asked, in the order they came, as base64 in JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
from functools import cache
from typing import Any

from aiohttp import ClientSession, web

INFO = {
    "/model_info": {"model_path": "canned", "is_generation": True, "weight_version": "0"},
    "/server_info": {"skip_tokenizer_init": True, "enable_memory_saver": False, "version": "0.5.17"},
}
LOG_PROB = -11.234567890123456


@cache
def tail_of_reply(token: int, tokens: int, prompt: int, version: str) -> str:
    """A reply after its id, as a server without a tokenizer writes it: `token` again and again."""
    meta = {
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": prompt,
        "weight_version": version,
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[LOG_PROB, token, None]] * tokens,
        "completion_tokens": tokens,
        "cached_tokens": 0,
    }
    return f'{json.dumps(meta)[1:]}, "output_ids": {json.dumps([token] * tokens)}}}'


class Canned:
    """The server's handler."""

    def __init__(self, upstream: str | None, token: int):
        self.upstream, self.token = upstream, token
        self.recorded: list[bytes] = []
        self.version = "0"

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        if request.path == "/generate":
            return self._generate(await request.read())
        if request.path == "/recorded":
            taken, self.recorded = self.recorded, []
            return web.json_response([base64.b64encode(body).decode() for body in taken])
        if self.upstream is not None:
            return await self._forward(request)
        return web.json_response(INFO.get(request.path, {"success": True}))

    def _generate(self, body: bytes) -> web.Response:
        self.recorded.append(body)
        asked: dict[str, Any] = json.loads(body)
        tokens = asked["sampling_params"]["max_new_tokens"]
        tail = tail_of_reply(self.token, tokens, len(asked["input_ids"]), self.version)
        reply = f'{{"meta_info": {{"id": {json.dumps(asked.get("rid", ""))}, {tail}'
        return web.Response(text=reply, content_type="application/json")

    async def _forward(self, request: web.BaseRequest) -> web.Response:
        url, headers = f"{self.upstream}{request.path_qs}", {"Content-Type": request.content_type}
        async with (
            ClientSession() as session,
            session.request(request.method, url, data=await request.read(), headers=headers) as answer,
        ):
            body = await answer.read()
            async with session.get(f"{self.upstream}/model_info") as info:  # what was forwarded may have changed it
                self.version = str(json.loads(await info.read())["weight_version"])
            return web.Response(body=body, status=answer.status, content_type=answer.content_type)


async def serve(port: int, upstream: str | None, token: int) -> None:
    runner = web.ServerRunner(web.Server(Canned(upstream, token)))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream")
    parser.add_argument("--token", type=int, default=1)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, arguments.upstream, arguments.token))


if __name__ == "__main__":
    main()
