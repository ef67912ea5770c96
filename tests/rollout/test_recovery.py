"""Engines that are lost and come back, by fakes whose every token says which life of which engine it is from."""

import asyncio

import pytest

from miles.errors import EngineError, EngineLostError, WeightSyncError
from miles.protocols import EngineHealth
from miles.rollout.concurrent import run_all
from miles.rollout.engines import EngineFront
from miles.rollout.recovery import Recovery
from miles.types import GenerateRequest, GenerateResult, SamplingParams


class Engine:
    generates = True

    def __init__(self, name, breaks_at=(), comes_up=True):
        self.name, self.breaks_at, self.comes_up = name, set(breaks_at), comes_up
        self.served, self.life, self.gone, self.has_weights = 0, 0, False, True
        self.up = asyncio.Event()
        self.up.set()

    async def generate(self, request):
        life = self.life
        await asyncio.sleep(0.001)
        self.served += 1
        if self.served in self.breaks_at:
            self.gone = True
        if self.gone or life != self.life:
            raise EngineLostError(f"{self.name} died")
        assert self.has_weights, "asked before it had weights"
        return GenerateResult([self.name, self.life], [0.0, 0.0], "stop", [0, 0])

    async def restart(self):
        await self.up.wait()
        if not self.comes_up:
            raise EngineError("no GPU left")
        self.life, self.gone, self.has_weights = self.life + 1, False, False

    async def health(self):
        if self.gone:
            raise EngineLostError(f"{self.name} died")
        return EngineHealth(0, 0, 0, counts={"retries": float(self.served)})


class Fleet:
    """A front with engines that come back."""

    def __init__(self, *engines, most=3):
        self.engines, self.pushes = list(engines), 0
        self.front = EngineFront(engines, concurrency=64)
        self.front.recovery = Recovery(self.front.engines, most, lambda engine: engine.restart(), self.push)

    async def push(self):
        await asyncio.sleep(0.001)
        self.pushes += 1
        for engine in self.engines:
            engine.has_weights = True
        self.front.recovery.have_weights()

    async def ask(self, count):
        requests = [GenerateRequest(str(i), [1], SamplingParams()) for i in range(count)]
        return await run_all(self.front.generate(request, affinity=i) for i, request in enumerate(requests))


def test_requests_of_a_lost_engine_are_finished_by_another():
    async def story():
        fleet = Fleet(Engine("a"), Engine("b", breaks_at=[3]))
        results = await fleet.ask(20)
        assert len(results) == 20
        assert fleet.front.traffic.generated_tokens == 40  # nothing is counted twice
        await fleet.front.recovery.started()
        assert fleet.front.recovery.serving() == [0]  # up again, and without weights
        assert {result.tokens[0] for result in await fleet.ask(4)} == {"a"}
        await fleet.push()
        assert {tuple(result.tokens) for result in await fleet.ask(4)} == {("a", 0), ("b", 1)}
        assert fleet.pushes == 1

    asyncio.run(story())


def test_when_none_is_left_weights_are_sent_once_and_requests_wait():
    async def story():
        fleet = Fleet(Engine("a", breaks_at=[5]), Engine("b", breaks_at=[2]))
        results = await fleet.ask(30)
        assert len(results) == 30
        assert fleet.pushes == 1
        assert fleet.front.recovery.serving() == [0, 1]
        assert fleet.front.recovery.restarts == 2

    asyncio.run(story())


def test_requests_of_one_life_count_it_lost_once():
    """Of many that fail with it, some are heard of only when it is back."""

    async def story():
        fleet = Fleet(Engine("a", breaks_at=[1]))
        recovery = fleet.front.recovery
        await fleet.ask(40)
        assert recovery.restarts == 1
        recovery.lose(0, 0, EngineLostError("heard of late"))
        assert recovery.restarts == 1
        assert recovery.serving() == [0]

    asyncio.run(story())


def test_one_that_does_not_come_up_is_an_error():
    async def story():
        fleet = Fleet(Engine("a", breaks_at=[1], comes_up=False))
        with pytest.raises(EngineLostError, match="engine 0 was lost and did not start again: no GPU left"):
            await fleet.ask(3)

    asyncio.run(story())


def test_too_often():
    async def story():
        fleet = Fleet(Engine("a", breaks_at=[1, 3, 5]), most=2)
        await fleet.ask(1)
        await fleet.ask(1)
        with pytest.raises(EngineLostError, match="a died") as raised:
            await fleet.ask(1)
        assert "--max-engine-restarts" in raised.value.__notes__[0]

    asyncio.run(story())


def test_one_that_cannot_be_started_again():
    async def story():
        engine = Engine("a", breaks_at=[1])
        fleet = Fleet(engine)
        fleet.front.engines[0] = fleet.front.recovery.engines[0] = OnlyGenerates(engine)
        with pytest.raises(EngineLostError, match="a died"):
            await fleet.ask(1)

    asyncio.run(story())


class OnlyGenerates:
    def __init__(self, engine):
        self.generate = engine.generate


def test_weights_that_do_not_arrive_are_an_error():
    async def story():
        fleet = Fleet(Engine("a", breaks_at=[1]))

        async def fails():
            fleet.pushes += 1
            raise WeightSyncError("no")

        fleet.front.recovery.resync = fails
        waiting = (fleet.front.generate(GenerateRequest(str(i), [1], SamplingParams())) for i in range(5))
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert {str(error) for error in told} == {"no"}
        assert fleet.pushes == 1  # of five that wait one tries, for all

    asyncio.run(story())


def test_who_is_gone_is_found_before_weights_are_sent_again():
    async def story():
        fleet = Fleet(Engine("a"), Engine("b"))
        fleet.engines[1].gone = True
        await fleet.front.recovery.find_lost()
        assert not fleet.engines[1].gone
        assert fleet.front.recovery.serving() == [0]
        await fleet.push()
        assert fleet.front.recovery.serving() == [0, 1]

    asyncio.run(story())


def test_one_that_is_lost_while_weights_are_sent_has_none():
    async def story():
        fleet = Fleet(Engine("a"), Engine("b", breaks_at=[1]))
        fleet.engines[1].up.clear()
        await fleet.ask(2)
        fleet.front.recovery.have_weights()  # the sync of a step: engine b is still starting
        assert fleet.front.recovery.serving() == [0]
        fleet.engines[1].up.set()
        await fleet.front.recovery.started()
        assert fleet.front.recovery.serving() == [0]

    asyncio.run(story())


def test_a_start_under_way_ends_with_the_run():
    async def story():
        fleet = Fleet(Engine("a"), Engine("b", breaks_at=[1]))
        fleet.engines[1].up.clear()
        await fleet.ask(2)
        await fleet.front.recovery.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())


def test_without_recovery_a_lost_engine_is_an_error():
    async def story():
        front = EngineFront([Engine("a", breaks_at=[1])], concurrency=4)
        with pytest.raises(EngineLostError):
            await front.generate(GenerateRequest("1", [1], SamplingParams()))

    asyncio.run(story())


def test_counts_are_those_since_they_were_last_asked_for():
    async def story():
        fleet = Fleet(Engine("a"), Engine("b"))
        await fleet.ask(6)
        assert await fleet.front.take_counts() == {"retries": 6.0, "restarts": 0.0}
        await fleet.ask(2)
        assert await fleet.front.take_counts() == {"retries": 2.0, "restarts": 0.0}

    asyncio.run(story())


def test_one_that_is_lost_while_nobody_asks_it_counts_later():
    """What it did is done; that it is gone, whoever needs it next will find."""

    async def story():
        fleet = Fleet(Engine("a"), Engine("b"))
        await fleet.ask(6)
        fleet.engines[1].gone = True
        assert await fleet.front.take_counts() == {"retries": 3.0, "restarts": 0.0}
        await fleet.front.recovery.find_lost()
        await fleet.push()
        await fleet.ask(2)
        assert await fleet.front.take_counts() == {"retries": 5.0, "restarts": 1.0}

    asyncio.run(story())
