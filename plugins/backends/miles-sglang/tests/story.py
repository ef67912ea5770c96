"""Stories of an engine in front of servers that answer as SGLang does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fake_server import FakeSGLang, context, listening
from miles_sglang.engine import SGLangEngine
from miles_sglang.options import ExternalOptions

from miles.api import GenerateRequest, SamplingParams
from miles.toolkit import Shipment

CHECKPOINT = Shipment("miles.builtins.disk_sync:read", {"folder": "weight_v1"})
ALL = frozenset({"weights", "kv_cache", "graphs"})


def ask(id: str = "1", prompt: int = 3, length: int = 4, **kwargs: Any) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=length, **kwargs.pop("sampling", {}))
    return GenerateRequest(id, list(range(10, 10 + prompt)), sampling, **kwargs)


def run(
    story: Callable[[SGLangEngine], Awaitable[Any]],
    *fakes: FakeSGLang,
    router: FakeSGLang | None = None,
    **options: Any,
) -> Any:
    """Run `await story(engine)` with a started engine in front of these servers."""

    async def whole() -> Any:
        everybody = [*fakes, *([router] if router else [])]
        async with asyncio.timeout(20), listening(*everybody):
            if router:
                host, port = router.url.removeprefix("http://").split(":")
                options.update(router_ip=host, router_port=int(port))
            given = ExternalOptions(**{"urls": [fake.url for fake in fakes], "start_timeout": 5, **options})
            engine = SGLangEngine(given, context=context())
            await engine.start()
            try:
                return await story(engine)
            finally:
                await engine.close()

    return asyncio.run(whole())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)
