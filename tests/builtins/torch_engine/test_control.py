"""Abort, pause, resume, sleep, wake, cancellation and failure."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch

from miles.errors import EngineError


def long_requests(lab, count=3, **params):
    return [lab.request([5, 6, i], seed=i, id=f"r{i}", max_new_tokens=200, **params) for i in range(count)]


async def begun(engine, requests, tokens=5):
    """Tasks for these requests, each of which has at least some tokens."""
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    while True:
        await asyncio.sleep(0.001)
        slots = engine.scheduler.slots
        if slots.count == len(requests) and slots.lengths_S[: slots.count].min() > 3 + tokens:
            return tasks


def test_abort_one_and_all(lab):
    requests = long_requests(lab)
    whole = lab.run(lab.model("qwen3"), requests)

    async def main(engine):
        tasks = await begun(engine, requests)
        await engine.abort("r1")
        assert tasks[1].done()
        assert not tasks[0].done()
        await engine.abort()
        return await asyncio.gather(*tasks)

    results = lab.with_engine(main)
    for result, complete in zip(results, whole, strict=True):
        assert result.finish_reason == "abort"
        assert 5 <= len(result.tokens) < 200
        assert result.tokens == complete.tokens[: len(result.tokens)]
        assert len(result.log_probs) == len(result.weight_versions) == len(result.tokens)


def test_abort_reaches_requests_that_still_wait(lab):
    async def main(engine):
        tasks = [asyncio.ensure_future(engine.generate(request)) for request in long_requests(lab, 3)]
        await asyncio.sleep(0)
        await engine.abort()
        return await asyncio.gather(*tasks)

    results = lab.with_engine(main, max_running=1)
    assert [result.finish_reason for result in results] == ["abort"] * 3
    assert results[2].tokens == []


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_go_on_as_if_nothing_had_happened(lab, mode):
    requests = long_requests(lab)
    whole = lab.run(lab.model("qwen3"), requests)

    async def main(engine):
        tasks = await begun(engine, requests)
        await engine.pause(mode)
        health = await engine.health()
        expected = (0, 3) if mode == "retract" else (3, 0)
        assert (health.running, health.waiting) == expected
        late = asyncio.ensure_future(engine.generate(lab.request([1, 2], max_new_tokens=2)))
        await asyncio.sleep(0.03)
        assert not any(task.done() for task in [*tasks, late])
        await engine.resume()
        await late
        return await asyncio.gather(*tasks)

    for result, complete in zip(lab.with_engine(main), whole, strict=True):
        assert result.tokens == complete.tokens
        np.testing.assert_allclose(result.log_probs, complete.log_probs, atol=2e-5)


def test_pausing_can_abort_what_runs(lab):
    async def main(engine):
        tasks = await begun(engine, long_requests(lab))
        await engine.pause("abort")
        results = await asyncio.gather(*tasks)
        assert [result.finish_reason for result in results] == ["abort"] * 3
        late = asyncio.ensure_future(engine.generate(lab.request([1, 2], max_new_tokens=2)))
        await asyncio.sleep(0.02)
        assert not late.done()
        await engine.resume()
        assert len((await late).tokens) == 2

    lab.with_engine(main)


def test_a_cancelled_caller_frees_its_slot(lab):
    async def main(engine):
        tasks = await begun(engine, long_requests(lab, 2))
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await engine.pause("in_place")
        assert (await engine.health()).running == 1
        await engine.resume()
        assert len((await tasks[1]).tokens) == 200

    lab.with_engine(main)


def test_sleep_gives_memory_back_and_wake_restores_service(lab):
    async def main(engine):
        request = lab.request([1, 2, 3], seed=3, max_new_tokens=4)
        before = await engine.generate(request)
        await engine.sleep(frozenset({"weights", "kv_cache", "graphs"}))
        assert (await engine.health()).asleep == {"weights", "kv_cache", "graphs"}
        with pytest.raises(EngineError, match="asleep"):
            await engine.generate(request)
        with pytest.raises(AssertionError):
            _ = engine.scheduler.arena.cache
        await engine.wake(frozenset({"weights"}))
        with pytest.raises(EngineError, match="graphs, kv_cache"):
            await engine.score([1, 2])
        await engine.wake(frozenset({"kv_cache", "graphs"}))
        after = await engine.generate(request)
        assert (await engine.health()).asleep == frozenset()
        return before, after

    before, after = lab.with_engine(main)
    assert (before.tokens, before.log_probs) == (after.tokens, after.log_probs)
    assert after.cached_tokens == 0


def test_requests_survive_a_nap(lab):
    requests = long_requests(lab)
    whole = lab.run(lab.model("qwen3"), requests)

    async def main(engine):
        tasks = await begun(engine, requests)
        await engine.sleep(frozenset({"kv_cache"}))
        await asyncio.sleep(0.02)
        await engine.wake(frozenset({"kv_cache"}))
        return await asyncio.gather(*tasks)

    assert [r.tokens for r in lab.with_engine(main)] == [r.tokens for r in whole]


def test_the_event_loop_is_never_blocked(lab):
    async def main(engine):
        done = asyncio.gather(*(engine.generate(request) for request in long_requests(lab, 30)))
        longest, last = 0.0, time.perf_counter()
        while not done.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest

    # Not a step of the model, let alone 200 of them; generous, for a machine that does other things.
    assert lab.with_engine(main) < 0.25


def test_a_failing_step_fails_its_requests_only(lab):
    async def main(engine):
        decoder = engine.scheduler.decoder
        forward = decoder.forward
        decoder.forward = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
        with pytest.raises(EngineError, match="a step failed: MemoryError: no room"):
            await engine.generate(lab.request([1, 2], max_new_tokens=3))
        with pytest.raises(EngineError, match="scoring failed"):
            await engine.score([1, 2])
        decoder.forward = forward
        return await engine.generate(lab.request([1, 2], max_new_tokens=3))

    assert len(lab.with_engine(main).tokens) == 3


def test_output_that_is_not_finite_fails_the_request_and_poisons_nobody(lab):
    async def main(engine):
        embedding = engine.scheduler.decoder.weights["embed.weight"]
        kept = embedding[7].clone()
        embedding[7] = torch.nan
        good = asyncio.gather(*(engine.generate(r) for r in long_requests(lab, 2)))
        with pytest.raises(EngineError, match="request 'bad' is not finite"):
            await engine.generate(lab.request([1, 7], id="bad", max_new_tokens=3))
        await asyncio.gather(good, return_exceptions=True)  # token 7 may have been drawn
        embedding[7] = kept
        await engine.flush_cache()
        return await asyncio.gather(*(engine.generate(r) for r in long_requests(lab, 2)))

    clean = lab.run(lab.model("qwen3"), long_requests(lab, 2))
    assert [r.tokens for r in lab.with_engine(main)] == [r.tokens for r in clean]


def test_an_engine_that_breaks_says_why_to_everybody_and_takes_no_further_turn(lab):
    turns = []

    def breaks():
        turns.append(1)
        raise RuntimeError("between two steps")

    async def main(engine):
        await engine.health()
        engine.scheduler.step = breaks
        requests = [asyncio.ensure_future(engine.generate(request)) for request in long_requests(lab, 3)]
        while not turns:
            await asyncio.sleep(0)
        time.sleep(0.05)  # the event loop has not heard of it
        with pytest.raises(EngineError, match="stopped working: RuntimeError: between two steps"):
            await engine.generate(lab.request([1]))
        for failed in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(failed, EngineError)
            assert "stopped working: RuntimeError: between two steps" in str(failed)
        with pytest.raises(EngineError, match="not running: it stopped working"):
            await engine.health()
        await engine.close()

    lab.with_engine(main)
    assert len(turns) == 1


def test_a_closed_engine_says_so(lab):
    async def main():
        engine = await lab.started(lab.model("qwen3"))
        tasks = await begun(engine, long_requests(lab, 1))
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await tasks[0]
        with pytest.raises(EngineError, match="not running"):
            await engine.generate(lab.request([1]))
        with pytest.raises(EngineError, match="not running"):
            await engine.health()
        await engine.close()

    asyncio.run(main())
