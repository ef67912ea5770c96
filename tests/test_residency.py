"""The order in which trainer and engines move, recorded by fakes."""

import asyncio

from miles.errors import EngineLostError
from miles.residency import Residency


class Recorder:
    def __init__(self):
        self.log = []

    async def call(self, method, parts):
        self.log.append((method, *sorted(parts)))

    async def sleep(self, parts):
        self.log.append(("sleep", *sorted(parts)))

    async def wake(self, parts):
        self.log.append(("wake", *sorted(parts)))


class Lost(Recorder):
    async def sleep(self, parts):
        raise EngineLostError("gone")

    wake = sleep


def walk(residency, recorder):
    async def steps():
        for phase in ("syncing", "rollout", "training", "syncing", "rollout"):
            async with getattr(residency, phase)():
                recorder.log.append(phase)

    asyncio.run(steps())


def test_colocated_order():
    recorder = Recorder()
    walk(Residency(recorder, [recorder], offload_train=True, offload_rollout=True), recorder)
    first_rollout = recorder.log.index("rollout")
    assert recorder.log[first_rollout:] == [
        "rollout",
        ("sleep", "graphs", "kv_cache", "weights"),
        ("onload", "gradients", "optimizer", "other models", "policy"),
        "training",
        ("offload", "gradients", "optimizer", "other models"),
        ("wake", "weights"),
        "syncing",
        ("offload", "policy"),
        ("wake", "graphs", "kv_cache"),
        "rollout",
    ]


def test_without_offloading_nothing_moves():
    recorder = Recorder()
    walk(Residency(recorder, [recorder], offload_train=False, offload_rollout=False), recorder)
    assert recorder.log == ["syncing", "rollout", "training", "syncing", "rollout"]


def test_weights_in_the_middle_of_a_rollout():
    recorder = Recorder()
    residency = Residency(recorder, [recorder], offload_train=True, offload_rollout=True)

    async def story():
        async with residency.rollout():
            recorder.log.clear()
            async with residency.syncing():
                recorder.log.append("syncing")
            async with residency.rollout():
                recorder.log.append("rollout")

    asyncio.run(story())
    assert recorder.log == [
        ("sleep", "graphs", "kv_cache"),
        ("onload", "policy"),
        "syncing",
        ("offload", "policy"),
        ("wake", "graphs", "kv_cache"),
        "rollout",
    ]


def test_a_trainer_that_makes_room_has_done_so_before_the_engines_start():
    recorder = Recorder()
    residency = Residency(recorder, [recorder], offload_train=True, offload_rollout=True)

    async def story():
        async with residency.syncing():
            recorder.log.append("syncing")

    asyncio.run(story())
    assert recorder.log == [("sleep", "graphs", "kv_cache"), ("onload", "policy"), "syncing"]


def test_an_engine_that_is_lost_stands_in_nobodys_way():
    recorder = Recorder()
    residency = Residency(recorder, [Lost(), recorder], offload_train=False, offload_rollout=True)

    async def story():
        async with residency.training(), residency.syncing():
            recorder.log.append("syncing")

    asyncio.run(story())
    assert recorder.log == [("sleep", "graphs", "kv_cache", "weights"), ("wake", "weights"), "syncing"]


def test_an_engine_that_starts_finds_room_and_then_sleeps_like_the_others():
    recorder = Recorder()
    residency = Residency(recorder, [recorder], offload_train=True, offload_rollout=True)

    async def story():
        async with residency.syncing():
            recorder.log.clear()
            await residency.make_room()
            await residency.settle(recorder)

    asyncio.run(story())
    assert recorder.log == [("offload", "policy"), ("sleep", "graphs", "kv_cache")]


def test_the_trainer_comes_back_though_an_engine_is_lost():
    """A run that is asked to stop meanwhile saves: nobody waits for the engine any more."""
    recorder = Recorder()
    residency = Residency(recorder, [Lost(), recorder], offload_train=True, offload_rollout=True)

    async def story():
        async with residency.rollout():
            recorder.log.clear()
        async with residency.training():
            recorder.log.append("training")

    asyncio.run(story())
    assert recorder.log == [
        ("sleep", "graphs", "kv_cache", "weights"),
        ("onload", "gradients", "optimizer", "other models", "policy"),
        "training",
    ]
