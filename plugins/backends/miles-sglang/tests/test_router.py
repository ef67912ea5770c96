"""The router comes up when it has found its servers; the real one does what `miles_sglang.router` says of it."""

import asyncio
import importlib.util
from collections import Counter
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from miles_sglang.router import DROPPED, ROUTING_KEY, RouterProcess

from miles.api import EngineError

REAL = pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="needs sglang-router")


def test_it_is_up_when_it_has_found_all_servers(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stand_ins))

    async def story():
        router = RouterProcess(["http://a", "http://b"], tmp_path / "router.log")
        await router.start()
        async with aiohttp.ClientSession() as session:
            assert await router.ready(session)
            router.servers.append("http://c")
            assert not await router.ready(session)
        assert router.death() == ""
        await router.stop()
        assert router.death() == "the SGLang router was stopped"
        router.close()

    asyncio.run(story())
    said = (tmp_path / "router.log").read_text()
    assert "--policy manual --assignment-mode min_group --disable-retries" in said
    assert "--worker-urls http://a http://b" in said


def test_a_missing_router_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("miles_sglang.router.installed", lambda package: False)
    with pytest.raises(EngineError, match="2 servers of one engine need a router.*pip install sglang-router"):
        RouterProcess(["a", "b"], tmp_path / "log")


class Worker:
    """Speaks as much of SGLang's API as the router asks for, and remembers requests."""

    def __init__(self):
        self.bodies = []
        self.health_checks = 0

    async def generate(self, request):
        self.bodies.append(body := await request.json())
        return web.json_response({"text": ""}, status=500 if body["input_ids"] == [500] else 200)

    async def inform(self, request):
        self.health_checks += request.path == "/health"
        return web.json_response({"model_path": "tiny", "served_model_name": "tiny", "tp_size": 1, "dp_size": 1})

    async def start(self, stack):
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/{path:.*}", self.inform)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site.port}"


def before_two_servers(folder, story, **arguments):
    """Run `story(ask, workers)` with the real router; `ask(body, key)` gives the status of its answer."""

    async def whole():
        workers = [Worker(), Worker()]
        async with asyncio.timeout(60), AsyncExitStack() as stack:
            urls = [await worker.start(stack) for worker in workers]
            router = RouterProcess(urls, folder / "router.log", arguments)
            await router.start()
            stack.push_async_callback(router.stop)
            session = await stack.enter_async_context(aiohttp.ClientSession(router.url))

            async def ask(body, key=None):
                headers = {ROUTING_KEY: key} if key else {}
                asked = {"sampling_params": {"max_new_tokens": 2}, **body}
                async with session.post("/generate", json=asked, headers=headers) as reply:
                    return reply.status

            await story(ask, workers)

    asyncio.run(whole())


@REAL
def test_requests_of_one_key_go_to_one_server_and_keys_are_spread(tmp_path):
    async def story(ask, workers):
        asked = [ask({"input_ids": [number, number % 20]}, f"prompt {number % 20}") for number in range(60)]
        assert await asyncio.gather(*asked) == [200] * 60
        seen = [Counter(body["input_ids"][1] for body in worker.bodies) for worker in workers]
        assert all(set(counts.values()) == {3} for counts in seen)
        assert min(map(len, seen)) >= 6

    before_two_servers(tmp_path, story)


@REAL
def test_what_the_engine_says_arrives_but_for_what_is_known_not_to(tmp_path):
    body = {
        "rid": "a.1$", "input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 0, "extra_key": "3",
        "priority": 2, "stream": False,
        "sampling_params": {
            "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_new_tokens": 4, "min_new_tokens": 1,
            "stop": ["x"], "stop_token_ids": [3], "no_stop_trim": True, "skip_special_tokens": False,
            "sampling_seed": 7,
        },
    }  # fmt: skip

    async def story(ask, workers):
        assert await ask(body | {"return_routed_experts": True, "routed_experts_start_len": 4,
                                 "return_sampling_mask": True}) == 200  # fmt: skip
        ((arrived,),) = [worker.bodies for worker in workers if worker.bodies]
        params = {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in body["sampling_params"].items()
        }
        assert {name: arrived.get(name) for name in body} == body | {"sampling_params": params}
        assert DROPPED & set(arrived) == set()

    before_two_servers(tmp_path, story)


@REAL
def test_a_server_s_error_is_passed_on_and_the_request_not_made_again(tmp_path):
    async def story(ask, workers):
        assert [await ask({"input_ids": [500]}) for _ in range(30)] == [500] * 30
        assert sum(len(worker.bodies) for worker in workers) == 30
        assert await ask({"input_ids": [1]}) == 200

    before_two_servers(tmp_path, story)


@REAL
def test_a_server_that_may_sleep_is_not_asked_to_generate_for_its_health(tmp_path):
    async def story(ask, workers):
        before = [worker.health_checks for worker in workers]
        await asyncio.sleep(2.5)
        assert [worker.health_checks for worker in workers] == before
        assert await ask({"input_ids": [1]}) == 200

    before_two_servers(tmp_path, story, health_check_interval_secs=1)


@REAL
def test_its_arguments_can_be_changed(tmp_path):
    async def story(ask, workers):
        for number in range(6):
            await ask({"input_ids": [number]}, "one key")
        assert [len(worker.bodies) for worker in workers] == [3, 3]

    before_two_servers(tmp_path, story, policy="round_robin")
