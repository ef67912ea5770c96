"""The simulation behind the table of rollout modes: its clock, its engine, its bounds, and short runs of the modes."""

import asyncio
import time
from dataclasses import replace

import pytest
import rollout_modes
from simulated.clock import VirtualLoop
from simulated.engine import END, EngineOptions, SimulatedEngine
from simulated.trace import Machine, Step, Trace, Trajectory

from miles.types import GenerateRequest, SamplingParams

SHORT = rollout_modes.Scene(steps=4, batch=4, group=4, slots=16, train_seconds=20.0)


def run(main):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


# ------------------------------------------------------------------------------------------------------------ the clock


def test_an_hour_takes_no_time_and_timers_keep_their_order():
    told = []

    async def after(seconds):
        await asyncio.sleep(seconds)
        told.append((seconds, asyncio.get_running_loop().time()))

    async def main():
        await asyncio.gather(after(3600), after(0.5), after(20))

    started = time.perf_counter()
    run(main())
    assert told == [(0.5, 0.5), (20, 20.0), (3600, 3600.0)]
    assert time.perf_counter() - started < 60


def test_the_clock_waits_for_a_thread():
    async def main():
        sleeper = asyncio.create_task(asyncio.sleep(10))
        await asyncio.to_thread(time.sleep, 0.05)
        at = asyncio.get_running_loop().time()
        await sleeper
        return at

    assert run(main()) == 0


def test_tasks_that_wait_for_each_other_are_an_error(monkeypatch):
    monkeypatch.setattr("simulated.clock.PATIENCE", 0.01)

    async def main():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="every task waits for another one"):
        run(main())


# ----------------------------------------------------------------------------------------------------------- the engine


def engine_of(lengths, **options):
    """`lengths`: seed -> tokens of the turn. A step takes 10 ms and 10 more for each sequence; prefilling is free."""
    options = EngineOptions(**{"step_ms": 10.0, "sequence_ms": 10.0, "prefill_ms": 0.0, **options})
    options.turn = lambda seed, start: (1000 + seed, lengths[seed])
    return SimulatedEngine(options)


async def said(engine, seed, tokens=(5,), most=1000):
    result = await engine.generate(
        GenerateRequest(f"{seed}.1", list(tokens), SamplingParams(max_new_tokens=most), seed)
    )
    return result, round(asyncio.get_running_loop().time(), 6)


def started(engine, main):
    async def whole():
        await engine.start()
        await engine.receive("simulated", 0, None)
        return await main()

    return run(whole())


def test_sequences_share_the_engine():
    engine = engine_of({1: 10, 2: 30})
    (one, at_one), (two, at_two) = started(engine, lambda: asyncio.gather(said(engine, 1), said(engine, 2)))
    assert at_one == 0.3  # 10 steps of 10 + 2 * 10 ms
    assert at_two == 0.7  # and 20 of 10 + 10 ms
    assert (len(one.tokens), one.finish_reason, one.tokens[-1]) == (10, "stop", END)
    assert (len(two.tokens), len(two.log_probs), two.weight_versions) == (30, 30, [0] * 30)
    assert engine.busy == pytest.approx(0.7)


def test_who_finds_no_slot_waits_and_pays_for_what_is_not_cached():
    engine = engine_of({1: 10, 2: 10}, slots=1, prefill_ms=100.0)
    (_, at_one), (_, at_two) = started(engine, lambda: asyncio.gather(said(engine, 1), said(engine, 2, [5, 5, 5])))
    assert at_one == 0.3  # one token of prompt, 10 steps of 20 ms
    assert at_two == 0.8  # three tokens, 10 steps

    async def again():
        await said(engine, 1)
        return await said(engine, 1, [5] * 11)

    engine = engine_of({1: 10}, prefill_ms=100.0)
    result, at = started(engine, again)
    assert (result.cached_tokens, at) == (11, 0.5)  # 0.1 + 0.2, and 0.2 without any prefill


def test_an_aborted_turn_goes_on_to_the_length_it_would_have_had():
    engine = engine_of({1: 30})

    async def main():
        first = asyncio.create_task(said(engine, 1))
        await asyncio.sleep(0.205)  # ten steps, and a quarter of one
        await engine.abort("1.1")
        part, at = await first
        rest, _ = await said(engine, 1, [5, *part.tokens])
        return part, at, rest

    part, at, rest = started(engine, main)
    assert (len(part.tokens), part.finish_reason, at) == (10, "abort", 0.205)
    assert (len(rest.tokens), rest.finish_reason) == (20, "stop")


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_tokens_are_stamped_with_the_weights_that_were_there(mode):
    engine = engine_of({1: 30})

    async def main():
        request = asyncio.create_task(said(engine, 1))
        await asyncio.sleep(0.2)
        await engine.pause(mode)
        await asyncio.sleep(1)
        await engine.receive("simulated", 1, None)
        await engine.resume()
        return await request

    result, at = started(engine, main)
    assert result.weight_versions == [0] * 10 + [1] * 20
    assert at == 1.6


def test_a_limit_ends_a_turn_without_its_end():
    engine = engine_of({1: 30})
    result, _ = started(engine, lambda: said(engine, 1, most=5))
    assert (result.tokens, result.finish_reason) == ([1001] * 5, "length")


# ----------------------------------------------------------------------------------------------------------- the bounds

ENGINE = EngineOptions(step_ms=1000.0, sequence_ms=1000.0, prefill_ms=0.0)
"""A sequence alone has a token in 2 s; two have one each in 3 s."""
MACHINE = Machine(ENGINE, slots=2, train=10.0, sync=1.0)


def trace_of(*batches):
    """Batches of (tokens, seconds of tools)."""
    steps = [Step(0.0, 0.0, [Trajectory(n, 0, tools, 0, 0.0) for n, tools in batch], 0) for batch in batches]
    return Trace(steps)


def test_the_critical_path_by_hand():
    trace = trace_of([(10, 0.0), (4, 5.0)], [(2, 30.0), (2, 0.0)])  # alone 20 and 13, 34 and 4; work 21 and 6
    assert MACHINE.works(trace) == [21.0, 6.0]
    assert MACHINE.critical_path(trace, 0) == (1 + 21 + 10) + (1 + 34 + 10)
    assert MACHINE.critical_path(trace, 1) == 1 + 34 + 10  # both from the beginning: the second one's tools decide
    assert MACHINE.critical_path(trace, None) == (1 + 21 + 10) + (1 + 10)
    assert MACHINE.critical_path(trace, None, carries=True) == (1 + 21 + 10) + (1 + 6 + 10)
    assert MACHINE.critical_path(trace, 1, one_by_one=True) == (1 + 21) + (1 + 34) + 10
    assert MACHINE.free_bound(trace) == 27.0
    assert replace(MACHINE, train=20.0).free_bound(trace) == 42.0


def test_staleness_lets_a_batch_begin_early():
    trace = trace_of(*[[(1, 38.0)]] * 3)  # 40 s each alone
    assert MACHINE.critical_path(trace, 0) == 3 * 51
    assert MACHINE.critical_path(trace, 1) == 51 + 1 + 40 + 10  # the third begins when the first is trained and sent
    assert MACHINE.critical_path(trace, 2) == 51 + 11 + 11


# ------------------------------------------------------------------------------------------------------------ the modes


@pytest.mark.parametrize("name", rollout_modes.MODES)
def test_no_mode_is_faster_than_its_bound_and_all_repeat_themselves(name):
    found = rollout_modes.row(name, SHORT)
    assert 0.3 < found["of its bound"] <= 1 + 1e-9
    assert found["of the free bound"] <= found["of its bound"]
    assert found == rollout_modes.row(name, SHORT)


def test_nothing_stale_is_sync_and_a_limit_of_two_is_one():
    sync, never, most_two = (rollout_modes.row(name, SHORT) for name in ("sync", "fully_async 0", "fully_async 2"))
    assert {**sync, "mode": ""} == {**never, "mode": ""}
    assert 0 < most_two["lag mean"] < most_two["lag max"] <= 2
    assert most_two["steps/h"] > sync["steps/h"]


def test_sync_trains_on_fresh_tokens_and_wastes_none():
    found = rollout_modes.row("sync", SHORT)
    assert (found["lag mean"], found["lag max"], found["dropped"], found["tokens lost"]) == (0, 0, 0, 0)
    assert found["of its bound"] > 0.9
    assert found["trainer idle"] == pytest.approx(1 - 20 / found["s/step"])
