"""Which requests a step is about does not depend on how fast threads happen to be."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from miles.builtins.torch_engine.handover import EngineSide, LoopSide


def play(lab, chance, deterministic=True):
    """Agents that answer each result with another request; both threads stumble at random. Returns who was in each
    step, and everything that was said."""
    steps, said = [], {}

    async def main():
        engine = await lab.started(lab.model("qwen3"), max_running=4, deterministic=deterministic)
        scheduler = engine.scheduler
        step = scheduler.step

        def stumbling():
            time.sleep(chance.random() * 0.002)
            step()
            steps.append([job.request.id for job in scheduler.slots.jobs])

        scheduler.step = stumbling

        async def agent(number):
            tokens = [number, 2, 3]
            for turn in range(3):
                length = 2 + (number * 7 + turn * 5) % 9
                request = lab.request(tokens, seed=number, id=f"{number}.{turn}", max_new_tokens=length)
                result = await engine.generate(request)
                said[request.id] = (result.tokens, result.log_probs)
                tokens = tokens + result.tokens + [turn]
                if chance.random() < 0.3:
                    time.sleep(0.003)  # the event loop is busy
                await asyncio.sleep(0)

        await asyncio.gather(*(agent(number) for number in range(7)))
        await engine.close()

    asyncio.run(main())
    return steps, said


def test_steps_are_the_same_however_threads_stumble(lab):
    first, said = play(lab, random.Random(0))
    for seed in (1, 2):
        steps, again = play(lab, random.Random(seed))
        assert steps == first
        assert again == said  # to the last bit


def test_without_lockstep_everything_still_arrives(lab):
    _, said = play(lab, random.Random(0), deterministic=False)
    _, expected = play(lab, random.Random(0))
    assert {id: tokens for id, (tokens, _) in said.items()} == {id: tokens for id, (tokens, _) in expected.items()}


def test_a_long_lived_engine_computes_what_a_fresh_one_does(lab):
    """To the last bit, after a weight sync: a resumed run has a fresh engine, an unbroken one has not."""
    model = lab.model("qwen3")
    requests = [lab.request([1, 2, i], seed=i, max_new_tokens=20) for i in range(5)]

    async def old():
        engine = await lab.started(model)
        many = [lab.request([i], seed=i, max_new_tokens=100) for i in range(60)]
        await asyncio.gather(*(engine.generate(request) for request in many))
        await engine.receive("inprocess", 2, lab.weights_of(model))
        results = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        return results

    for aged, fresh in zip(asyncio.run(old()), lab.run(model, requests), strict=True):
        assert (aged.tokens, aged.log_probs) == (fresh.tokens, fresh.log_probs)


def test_a_batch_holds_everything_that_one_cause_brought_about():
    async def main():
        side = LoopSide(asyncio.get_running_loop(), lambda: None)
        ran = []

        async def chain(depth):
            for _ in range(depth):
                await asyncio.sleep(0)
            side.submit(lambda: ran.append(depth))

        await asyncio.gather(*(chain(depth) for depth in (0, 3, 11)))
        while side.inbox.empty():
            await asyncio.sleep(0)
        batch = side.inbox.get_nowait()
        assert side.inbox.empty()
        for action in batch.actions:
            action()
        return ran

    # Other tasks of the loop (this one) hop too, so the batch closes only once they are done.
    assert asyncio.run(main()) == [0, 3, 11]


@pytest.mark.parametrize("deterministic", [True, False])
def test_one_delivery_at_a_time(deterministic):
    """The second waits for the answer to the first, which is taken in a fixed number of steps later."""

    async def main():
        side = LoopSide(asyncio.get_running_loop(), lambda: None)
        engine = EngineSide(side, steps=2, deterministic=deterministic)
        assert not engine.hand_out([])
        future = asyncio.get_running_loop().create_future()
        assert engine.hand_out([(future, "said")])
        assert engine.hand_out([(future, "again")]) is not deterministic
        assert await future == "said"
        await asyncio.sleep(0.01)
        engine.clock = 1
        engine.take_in(idle=False)
        assert engine.hand_out([(future, "more")]) is not deterministic
        engine.clock = 2
        engine.take_in(idle=False)
        assert engine.hand_out([(future, "more")])

    asyncio.run(main())
