"""One fault at a time between the engine and a server: what the engine does, and that nothing is generated twice."""

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
from faults import LOST, PASSING, UNSEEN, Fault, FaultyProxy, RandomPlan, always, first, once
from miles_sglang.sender import FIRST_WAIT
from served import Oracle, Witness, served, tiny_context

from miles.config import Spec
from miles.errors import EngineError, EngineLostError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.testing import tiny
from miles.toolkit import Shipment
from miles.types import GenerateRequest, SamplingParams

TIMEOUT = 1.0
"""Of clients that meet late answers, which are later."""
PATIENCE = 30.0
"""Of all others."""
FOLDER = str(tiny.saved("llama"))
ALTERED = {Fault.NO_META, Fault.NO_LOG_PROBS, Fault.FEWER_LOG_PROBS, Fault.FOREIGN, Fault.BEYOND_VOCABULARY}
"""What the proxy can do to whole answers only."""


@dataclass
class Place:
    """An engine, the proxy that it takes for a server, and the server."""

    engine: object
    proxy: FaultyProxy
    server: Witness

    @property
    def oracle(self) -> Oracle:
        return self.server.engine

    async def counts(self):
        return (await self.engine.health()).counts

    async def until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            await asyncio.sleep(0.005)

    async def idle(self):
        """The server works on nothing any more."""
        await self.until(lambda: not self.server.running)

    @property
    def record(self):
        """What the proxy noted of the only request."""
        (record,) = self.proxy.records.values()
        return record


def build(name, context, **options):
    return Registry(load_plugins()).build("rollout_engines", Spec(name=name, options=options), context=context)


def at(plan, story, retries=2, model=False, timeout=PATIENCE, **options):
    """Run `await story(place)` with an engine behind a proxy with this plan. `model`: the server has one."""

    async def whole():
        context = tiny_context()
        streams = options.get("stream", False)
        server = Witness(build("torch", context) if model else Oracle())
        async with (
            asyncio.timeout(2 * PATIENCE),
            served(server, context, incremental=streams) as url,
            FaultyProxy(url, plan, delay=2 * TIMEOUT) as proxy,
        ):
            given = {"urls": [proxy.url], "timeout": timeout, "retries": retries, **options}
            engine = build("sglang_external", context, **given)
            await engine.start()
            try:
                return await story(Place(engine, proxy, server))
            finally:
                await engine.close()

    return asyncio.run(whole())


def ask(seed=7, id="r", length=4):
    return GenerateRequest(id, [3, 4, 5], SamplingParams(max_new_tokens=length), seed=seed)


KINDS = {
    Fault.REFUSED: "unreachable",
    Fault.HUNG_UP: "unreachable",
    Fault.RESET: "unreachable",
    Fault.ERROR_500: "refused",
    Fault.ERROR_503: "refused",
    Fault.BUSY_429: "refused",
    Fault.GATEWAY_504: "refused",
    Fault.SLOW: "timeouts",
}
"""What the engine counts a fault as; all others are `malformed`."""


def limit(fault):
    return TIMEOUT if fault is Fault.SLOW else PATIENCE


# ------------------------------------------------------------------------------------------- a fault that passes


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(fault):
    async def story(place):
        result = await place.engine.generate(ask())
        await place.idle()
        assert result.tokens == place.oracle.said(ask())
        assert result.log_probs == [-0.5] * 4
        first_rid, second_rid = place.record.rids
        assert place.server.generated == {second_rid: 1} if fault in UNSEEN else {first_rid: 1, second_rid: 1}
        counts = await place.counts()
        assert (counts["retries"], counts[KINDS.get(fault, "malformed")]) == (1, 1)

    at(first(fault), story, timeout=limit(fault))


def test_two_deliveries_of_one_request_are_one_answer():
    async def story(place):
        result = await place.engine.generate(ask())
        await place.idle()
        assert result.tokens == place.oracle.said(ask())
        (rid,) = place.record.rids
        assert place.server.generated == {rid: 1}  # the server turned the second one away
        assert not (await place.counts()).get("retries")

    at(first(Fault.TWICE), story)


def test_back_off_grows():
    """So that a server which has too much to do is not asked the more, the less it can answer."""

    async def story(place):
        asked = []

        def plan(_, earlier):
            asked.append(time.monotonic())
            return Fault.ERROR_503 if earlier < 4 else None

        place.proxy.plan = plan
        await place.engine.generate(ask())
        pauses = [later - earlier for earlier, later in pairwise(asked)]
        assert len(pauses) == 4
        assert all(pause > 0.7 * FIRST_WAIT * 2**number for number, pause in enumerate(pauses))

    at(None, story, retries=5)


def test_answers_that_were_exchanged_are_noticed():
    """Each of many gets somebody else's answer first; all end with their own."""

    async def story(place):
        asked = [ask(seed=100 + i, id=str(i)) for i in range(20)]
        results = await asyncio.gather(*(place.engine.generate(request) for request in asked))
        assert [result.tokens for result in results] == [place.oracle.said(request) for request in asked]
        assert (await place.counts())["malformed"] == 20

    at(first(Fault.FOREIGN), story)


@pytest.mark.parametrize(
    "fault", [Fault.RESET, Fault.TRUNCATED, Fault.EMPTY, Fault.HTML, Fault.HUNG_UP, Fault.GATEWAY_504]
)
def test_a_stream_that_breaks_goes_on_where_it_broke(fault):
    """What had come is kept, and the rest asked for: with the same seed it is what would have come."""

    async def story(place):
        whole = await place.oracle.generate(ask(length=40))
        streamed = await place.engine.generate(ask(length=40))
        assert streamed.tokens == whole.tokens
        assert streamed.log_probs == pytest.approx(whole.log_probs, abs=1e-4)
        assert len(streamed.weight_versions) == 40
        kept = [len(record.body["input_ids"]) - 3 for record in place.proxy.records.values()]
        assert kept[0] == 0
        if fault in (Fault.RESET, Fault.TRUNCATED):
            assert 0 < kept[1] < 40

    at(once(fault), story, stream=True, model=True)


# ------------------------------------------------------------------------------------------ a fault that does not


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.BUSY_429, Fault.SLOW, Fault.RESET, Fault.HTML, Fault.NO_META])
def test_a_fault_that_stays_is_an_error_of_the_request_alone(fault):
    """The server is there; what it cannot do for this request it can do for another."""

    async def story(place):
        with pytest.raises(EngineError) as raised:
            await place.engine.generate(ask())
        await place.idle()
        assert not isinstance(raised.value, EngineLostError)
        assert len(place.record.rids) == len(set(place.record.rids)) == 3
        counts = await place.counts()
        assert (counts["retries"], counts[KINDS.get(fault, "malformed")]) == (2, 3)
        assert set(place.server.generated.values()) <= {1}
        place.proxy.plan = first()
        assert (await place.engine.generate(ask(seed=8))).tokens == place.oracle.said(ask(seed=8))

    at(always(fault), story, timeout=limit(fault))


def test_a_server_that_is_nowhere_is_lost():
    async def story(place):
        await place.proxy.close()
        with pytest.raises(EngineLostError):
            await place.engine.generate(ask())
        with pytest.raises(EngineLostError):
            await place.engine.health()

    at(first(), story)


def test_a_server_that_is_away_for_a_moment_is_not_lost():
    """Nobody listens when the last try has failed and it is asked whether it is there."""

    async def story(place):
        place.proxy.closed = 0.3
        with pytest.raises(EngineError) as raised:
            await place.engine.generate(ask())
        assert not isinstance(raised.value, EngineLostError)
        place.proxy.plan = first()
        assert (await place.engine.generate(ask())).tokens == place.oracle.said(ask())

    at(always(Fault.REFUSED), story, retries=0)


@pytest.mark.parametrize("tokens", [[], [1] * 256, [10**6]])
def test_a_request_that_cannot_be_served_is_not_sent(tokens):
    async def story(place):
        with pytest.raises(EngineError) as raised:
            await place.engine.generate(GenerateRequest("r", tokens, SamplingParams()))
        assert not isinstance(raised.value, EngineLostError)
        assert place.proxy.records == {}

    at(first(), story)


def test_what_the_server_rejects_is_not_asked_again():
    async def story(place):
        with pytest.raises(EngineError, match="that cannot be done") as raised:
            await place.engine.generate(ask())
        assert not isinstance(raised.value, EngineLostError)
        assert len(place.record.rids) == 1
        assert not (await place.counts()).get("retries")

    at(always(Fault.REJECTED_400), story)


# --------------------------------------------------------------------------- nobody works for those who have left


@pytest.mark.parametrize("fault", [None, *sorted(LOST)])
def test_what_nobody_waits_for_is_ended_on_the_server(fault):
    """The proxy tells no server that a client has left: the engine has to say so, of every attempt."""

    async def story(place):
        place.oracle.stuck = True
        with pytest.raises(EngineError):
            await place.engine.generate(ask())
        await place.idle()
        assert place.server.generated == dict.fromkeys(place.record.rids, 1)
        assert set(place.record.rids) == set(place.proxy.aborted)

    at(lambda asked, earlier: fault, story, retries=1, timeout=TIMEOUT)


def test_whoever_stops_waiting_takes_his_request_along():
    async def story(place):
        place.oracle.stuck = True
        task = asyncio.create_task(place.engine.generate(ask()))
        await place.until(lambda: place.server.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.idle()
        assert len(place.record.rids) == 1

    at(first(), story)


def test_an_abort_ends_a_request_that_waits_for_its_next_try():
    async def story(place):
        task = asyncio.create_task(place.engine.generate(ask()))
        await place.until(lambda: len(place.proxy.records) and len(place.record.rids) == 3)
        await place.engine.abort("r")
        result = await task
        assert (result.finish_reason, result.tokens) == ("abort", [])
        tries = len(place.record.rids)
        place.proxy.plan = first()
        await place.engine.generate(ask(seed=8, id="other"))
        assert len(place.proxy.records[next(iter(place.proxy.records))].rids) == tries

    at(always(Fault.ERROR_503), story, retries=1000)


# ------------------------------------------------------------------------------------- new weights in the middle of it


@pytest.mark.parametrize("stream", [False, True])
def test_weights_that_come_between_pieces_of_answers_leave_no_trace(stream):
    """They are the same under a new version, again and again, while requests run into faults: each answer is what it
    would have been, and its versions only grow."""

    async def story(place):
        asked = [ask(seed=i, id=str(i), length=80) for i in range(16)]
        answers = [asyncio.create_task(place.engine.generate(request)) for request in asked]
        version = 0
        while not all(answer.done() for answer in answers):
            version += 1
            await asyncio.sleep(0.05 * version)  # for more and more tokens to come
            await place.engine.pause("retract")
            await place.idle()
            await place.engine.receive("disk", version, Shipment("miles.builtins.disk_sync:read", {"folder": FOLDER}))
            await place.engine.resume()
        for request, result in zip(asked, await asyncio.gather(*answers), strict=True):
            alone = await place.server.engine.generate(request)
            assert result.tokens == alone.tokens
            assert result.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
            assert result.weight_versions == sorted(result.weight_versions)
            assert len(result.weight_versions) == 80
        assert len({version for answer in answers for version in answer.result().weight_versions}) > 1
        assert place.proxy.counts

    quick = [fault for fault in PASSING if fault is not Fault.SLOW and not (stream and fault in ALTERED)]
    at(RandomPlan(seed=1, share=0.3, faults=quick), story, retries=5, stream=stream, model=True)
