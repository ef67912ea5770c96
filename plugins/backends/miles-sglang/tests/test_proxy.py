"""The fault-injecting proxy does what it says, and its records are true."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from faults import GATEWAY_PAGE, HARMLESS, LOST, PASSING, SPOILT, UNSEEN, Fault, FaultyProxy, RandomPlan, always, first

HALF = {"id": "a", "output_token_logprobs": [[-1.0, 5, None]]}
ASKED = {"rid": "a", "input_ids": [3, 4], "sampling_params": {"max_new_tokens": 2}}
SAID = {"output_ids": [5, 6], "meta_info": {"id": "a", "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]]}}


def through(plan, story, **options):
    """Run `story(session, proxy, seen)` before a server that always says the same; `seen` are the ids it heard."""
    seen = []

    async def answer(request):
        seen.append((await request.json())["rid"])
        return web.json_response(SAID)

    async def whole():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        timeout = aiohttp.ClientTimeout(total=0.3)
        async with (
            asyncio.timeout(20),
            FaultyProxy(f"http://127.0.0.1:{site.port}", plan, **options) as proxy,
            aiohttp.ClientSession(timeout=timeout) as session,
        ):
            told = await story(session, proxy, seen)
        await runner.cleanup()
        return told

    return asyncio.run(whole())


async def post(session, proxy, body=ASKED, path="/generate"):
    """Status and text of an answer, or the class of what came in its place."""
    try:
        async with session.post(proxy.url + path, json=body) as reply:
            return reply.status, await reply.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error)


def meets(fault):
    """What a client gets that meets a fault, and how often the server heard of it."""

    async def story(session, proxy, seen):
        got = await post(session, proxy)
        assert proxy.counts == {fault: 1}
        (record,) = proxy.records.values()
        assert (record.rids, record.fates) == (["a"], [fault])
        assert bool(record.answers) == (fault is Fault.TWICE)
        return got, len(seen)

    return through(always(fault), story, delay=0.5)


@pytest.mark.parametrize("fault", Fault)
def test_who_hears_of_it(fault):
    _, heard = meets(fault)
    assert heard == (0 if fault in UNSEEN else 2 if fault is Fault.TWICE else 1)


@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        (Fault.REFUSED, aiohttp.ClientConnectionError),
        (Fault.HUNG_UP, aiohttp.ClientConnectionError),
        (Fault.RESET, aiohttp.ClientError),
        (Fault.SLOW, TimeoutError),
    ],
)
def test_connections_that_break(fault, errors):
    assert issubclass(meets(fault)[0], errors)


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        (Fault.ERROR_500, 500, "the scheduler is unwell"),
        (Fault.ERROR_503, 503, ""),
        (Fault.BUSY_429, 429, "slow down"),
        (Fault.REJECTED_400, 400, "that cannot be done"),
        (Fault.GATEWAY_504, 504, "upstream timed out"),
        (Fault.EMPTY, 200, ""),
        (Fault.TRUNCATED, 200, json.dumps(SAID)[: len(json.dumps(SAID)) // 2]),
        (Fault.HTML, 200, GATEWAY_PAGE.decode()),
    ],
)
def test_answers_that_are_none(fault, status, text):
    (found, said), _ = meets(fault)
    assert (found, text in said, bool(said)) == (status, True, bool(text))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault.NO_META, {"output_ids": [5, 6]}),
        (Fault.NO_LOG_PROBS, SAID | {"meta_info": {"id": "a"}}),
        (Fault.FEWER_LOG_PROBS, SAID | {"meta_info": HALF}),
        (Fault.FOREIGN, SAID | {"meta_info": SAID["meta_info"] | {"id": "somebody else's"}}),
        (Fault.BEYOND_VOCABULARY, json.loads(json.dumps(SAID).replace("6", "77"))),
        (Fault.TWICE, SAID),
    ],
)
def test_answers_that_are_almost_right(fault, said):
    async def story(session, proxy, seen):
        return await post(session, proxy)

    status, text = through(always(fault), story, beyond=77)
    assert (status, json.loads(text)) == (200, said)


def test_a_listener_that_is_gone_comes_back():
    async def story(session, proxy, seen):
        await post(session, proxy)
        refused = await post(session, proxy)
        while isinstance(got := await post(session, proxy), type):
            await asyncio.sleep(0.005)
        assert issubclass(refused, aiohttp.ClientConnectorError)
        return got

    assert through(first(Fault.REFUSED), story, closed=0.1)[0] == 200


def test_only_requests_for_tokens_suffer_and_a_plan_counts_each_of_them():
    async def story(session, proxy, seen):
        assert (await post(session, proxy, path="/abort_request"))[0] == 200
        other = ASKED | {"input_ids": [9]}
        for asked in (ASKED, other):
            assert (await post(session, proxy, asked))[0] == 503
            assert (await post(session, proxy, asked | {"rid": "b"}))[0] == 200
        assert proxy.aborted == ["a"]
        assert seen == ["a", "b", "b"]
        assert proxy.passed == {"/abort_request": 1, "/generate": 2}
        assert [record.rids for record in proxy.records.values()] == [["a", "b"]] * 2

    through(first(Fault.ERROR_503), story)


def test_a_seed_repeats_a_bad_day():
    asked = [f"request {i}" for i in range(2000)]
    plan, again, other = RandomPlan(1, 0.2), RandomPlan(1, 0.2), RandomPlan(2, 0.2)
    met = [plan(name, 0) for name in asked]
    assert met == [again(name, 0) for name in asked]
    assert met != [other(name, 0) for name in asked]
    assert met != [plan(name, 1) for name in asked]
    assert 300 < sum(fault is not None for fault in met) < 500
    assert set(met) == {None, *PASSING, *HARMLESS}
    assert not UNSEEN & LOST | UNSEEN & SPOILT | LOST & SPOILT
