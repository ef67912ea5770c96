"""How benchmarks take turns, and what becomes of one that fails."""

import asyncio
from mmap import mmap

import pytest

from miles.bench.compare import compare
from miles.bench.machine import Watch, machine
from miles.bench.measure import Benchmark, Circumstances, Measured, Quantity
from miles.bench.printed import printed
from miles.bench.rounds import Session, measure, new_results
from miles.errors import ConfigError


def counting(log, name, values, **more):
    """A benchmark that gives these values in turn and logs every round; an exception among them is raised."""

    async def prepare(bench):
        turn = iter(values)

        async def once():
            log.append(name)
            value = next(turn)
            if isinstance(value, BaseException):
                raise value
            return {"": value, "half": value / 2}

        return once

    quantities = {"": Quantity("s", "lower"), "half": Quantity("%", "neither")}
    return Benchmark(name, quantities, prepare, **more)


def run(benchmarks, rounds=2, warmup=1):
    session = Session(benchmarks, new_results("cpu", "smoke"), lambda line: None)
    asyncio.run(session.run(None, rounds, warmup))
    return session.results


def test_rounds_are_interleaved_and_warm_up_does_not_count():
    log = []
    found = run({"a": counting(log, "a", [9.0, 1.0, 2.0]), "b": counting(log, "b", [9.0, 3.0, 4.0])})
    assert log == ["a", "b"] * 3
    assert {name: m.rounds for name, m in found.measured.items()} == {
        "a": [1.0, 2.0], "a/half": [0.5, 1.0], "b": [3.0, 4.0], "b/half": [1.5, 2.0],
    }  # fmt: skip
    assert found.measured["a/half"].unit == "%"
    assert len(found.circumstances["a"].seconds) == 2


def test_one_that_fails_is_left_out_and_told():
    log = []
    found = run({"a": counting(log, "a", [9.0, ValueError("broken")]), "b": counting(log, "b", [9.0, 3.0, 4.0])})
    assert log == ["a", "b", "a", "b", "b"]
    assert found.errors == {"a": "ValueError: broken"}
    assert "a: FAILED: ValueError: broken" in printed(found)
    assert found.measured["b"].rounds == [3.0, 4.0]


def test_one_that_needs_something_is_left_out():
    found = run({"a": counting([], "a", [1.0], needs=("miles-of-nowhere",))})
    assert found.skipped == {"a": "needs miles-of-nowhere: pip install miles-of-nowhere"}
    assert found.measured == {}
    assert found.whole


def test_an_interruption_keeps_what_there_is(capsys):
    log, results = [], new_results("cpu", "smoke")
    benchmarks = {"a": counting(log, "a", [9.0, 1.0, 2.0]), "b": counting(log, "b", [9.0, 3.0, KeyboardInterrupt()])}
    measure(benchmarks, results, rounds=5, warmup=1)
    assert results.interrupted
    assert (results.measured["a"].rounds, results.measured["b"].rounds) == ([1.0, 2.0], [3.0])
    assert "interrupted" in printed(results)
    assert "round 2 of 5" in capsys.readouterr().err


def test_sizes_go_by_the_device():
    assert new_results("cpu", None).size == "cpu"
    with pytest.raises(ConfigError, match="--size big: there are cpu, gpu, smoke"):
        new_results("cpu", "big")


def test_the_machine_is_described():
    about = machine("cpu")
    assert about["cpu"]
    assert about["cores"] >= 1
    assert about["gpu"] is None


def test_memory_of_a_round():
    seen = Circumstances()
    Watch.start("cpu").stop(seen)
    if not seen.peak_mib:
        pytest.skip("this system does not tell the peak of its memory")
    watch = Watch.start("cpu")
    with mmap(-1, 64 * 2**20) as block:  # not from malloc, which may have as much of earlier tests at hand
        for page in range(0, len(block), 4096):
            block[page] = 1  # touched, so that it is really there
        watch.stop(seen)
    assert seen.added_mib[1] > 60
    assert seen.added_mib[0] < 30
    assert seen.seconds[1] > 0


def test_a_machine_that_moved_is_said():
    def at(speed):
        return {"machine": Measured("GFLOP/s", "neither", [speed, speed])}

    said = "the machine itself moved by -20.0% (machine): so much may be its own doing"
    found = new_results("cpu", "smoke")
    assert said in printed(found, compare(at(100.0), at(80.0), {}, {}))
    assert "the machine itself" not in printed(found, compare(at(100.0), at(98.0), {}, {}))


def test_a_comparison_is_printed():
    before = run({"a": counting([], "a", [9.0, 1.0, 1.0]), "b": counting([], "b", [9.0, 1.0, 1.0])})
    now = run({"a": counting([], "a", [9.0, 2.0, 2.0]), "c": counting([], "c", [9.0, 1.0, 1.0])})
    text = printed(now, compare(before.measured, now.measured, {"torch": "1"}, {"torch": "2"}))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "a 1 2 +100.0% regression" in lines
    assert "a/half 0.5 1 +100.0% changed" in lines
    assert "b: in the baseline, but not measured now" in lines
    assert "c: not in the baseline" in lines
    assert "warning: the baseline is of other circumstances: torch: 1 -> 2" in lines
    assert lines[-1] == "1 regression"
