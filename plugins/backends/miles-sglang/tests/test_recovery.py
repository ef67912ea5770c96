"""Servers that are killed at work: their samples are finished elsewhere or after a restart, none is lost or doubled,
and no token is drawn from other weights than those of now."""

import asyncio
import signal
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from served import tiny_context
from soak import Weather, disturbed, make_producer

from miles.api import EngineError, GenerateRequest, SamplingParams
from miles.config import Spec
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.rollout.engines import EngineFront
from miles.rollout.recovery import Recovery
from miles.testing import tiny
from miles.types import Status

PATIENCE = 120.0


# ------------------------------------------------------------------------------------------- in the middle of a batch


VERSION = 3
WEATHER = Weather(requests=320, new_tokens=24, concurrency=64)


class Fleet:
    """Engines behind a front, which come back and get the weights of now, as in a run. `pushes` counts those."""

    def __init__(self, registry, context, count, weights):
        questions = {"health_check_interval": 0.5, "health_check_timeout": 3.0}
        spec = Spec(name="sglang", options={"start_timeout": PATIENCE, **questions})
        contexts = (replace(context, rank=rank) for rank in range(count))
        self.engines = [registry.build("rollout_engines", spec, context=each) for each in contexts]
        self.weights, self.pushes = weights, 0
        self.front = EngineFront(self.engines, WEATHER.concurrency)
        self.recovery = Recovery(self.front.engines, 1, lambda engine: engine.restart(), self.push)
        self.front.recovery = self.recovery

    async def push(self):
        self.pushes += 1
        groups = (tiny.groups_of(self.weights) for _ in self.engines)
        await asyncio.gather(*(e.receive("inprocess", VERSION, g) for e, g in zip(self.engines, groups, strict=True)))
        self.recovery.have_weights()


@asynccontextmanager
async def fleet_of(count, registry, context, weights):
    fleet = Fleet(registry, context, count, weights)
    try:
        await asyncio.gather(*(engine.start() for engine in fleet.engines))
        await fleet.push()
        yield fleet
    finally:
        await fleet.recovery.close()
        await asyncio.gather(*(engine.close() for engine in fleet.engines))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_server_that_is_killed_or_hangs_loses_no_sample(count, how, servers, tmp_path):
    """With another engine its samples are finished there; without one they wait for its restart and the weights."""
    weights = load_file(tiny.saved("llama", 1) / "model.safetensors")  # not those of the checkpoint that servers know
    registry, context = Registry(load_plugins()), replace(tiny_context(), load_weights=False, run_dir=tmp_path)

    async def story():
        seeds = defaultdict(list)
        async with asyncio.timeout(PATIENCE), fleet_of(count, registry, context, weights) as fleet:
            producer = make_producer(WEATHER, registry, context, fleet.front, seeds)
            batch = asyncio.create_task(producer.collect(0))
            while fleet.front.traffic.generated_tokens < 80 * WEATHER.new_tokens:
                await asyncio.sleep(0.005)
            servers.kill(how)
            assert not batch.done()
            ended = [sample for group in await batch for sample in group.samples]
            assert producer.lost == []
            assert sorted(sample.id for sample in ended) == list(range(WEATHER.requests))
            assert {id: len(each) for id, each in seeds.items()} == dict.fromkeys(range(WEATHER.requests), 1)
            assert_by(VERSION, ended)
            await fleet.recovery.started()
            assert fleet.recovery.restarts == 1
            if count == 1:
                assert fleet.pushes == 2
            else:
                await assert_without_weights(fleet)
                await fleet.push()
            assert fleet.recovery.serving() == list(range(count))
            again = [engine.generate(GenerateRequest("again", [1, 2, 3], SamplingParams())) for engine in fleet.engines]
            assert len({tuple(result.tokens) for result in await asyncio.gather(*again)}) == 1
            return ended, producer.tasks["soak"].context.sampling

    async def undisturbed(ended, sampling):
        engine = registry.build("rollout_engines", Spec(name="torch"), context=context)
        await engine.start()
        await engine.receive("inprocess", VERSION, tiny.groups_of(weights))
        assert await disturbed(engine, sampling, ended) == []
        await engine.close()

    asyncio.run(undisturbed(*asyncio.run(story())))


def assert_by(version, samples):
    """Every token that a model produced is of these weights."""
    for sample in samples:
        assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
        assert set(sample.columns["weight_version"][sample.prompt_length :]) == {version}


async def assert_without_weights(fleet):
    """The engine that came back serves nobody: it is out of service, and it refuses by itself too."""
    (serving,) = fleet.recovery.serving()
    back = fleet.engines[1 - serving]
    assert fleet.pushes == 1
    with pytest.raises(EngineError, match="no weights have arrived since it started"):
        await back.generate(GenerateRequest("early", [1], SamplingParams()))
