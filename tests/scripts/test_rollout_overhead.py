"""What our own code costs a turn, and that a long run does not grow."""

import asyncio

import pytest
import rollout_overhead


@pytest.mark.parametrize(("task", "turns"), [("single_turn", 1), ("multi_turn", 10)])
def test_turns_are_counted_and_cost_little(task, turns):
    cost = asyncio.run(rollout_overhead.measure(task, sessions=40, rounds=2, tokens=16))
    assert cost.turns == 2 * 40 * turns
    assert 0 < cost.cpu_ms < 5  # 0.2 on a quiet machine; this one may be anything but


def test_what_python_holds_does_not_grow_with_episodes():
    found = asyncio.run(rollout_overhead.memory("multi_turn", episodes=200, sessions=20, tokens=16))
    assert [at.episodes for at in found] == [40, 80, 120, 160, 200]
    grown = found[-1].traced - found[1].traced
    assert grown < 60, [round(at.traced) for at in found]  # KiB; the 120 samples alone, kept by somebody, are 1,800


@pytest.mark.slow
def test_ten_thousand_episodes_leave_the_process_as_large_as_it_was():
    found = asyncio.run(rollout_overhead.memory("multi_turn", episodes=10_000, traced=False))
    grown = found[-1].resident - found[0].resident
    # The tokenizer remembers the last 10,000 different words, and malloc's heap breathes.
    assert grown < 20 * 1024, [round(at.resident) for at in found]
