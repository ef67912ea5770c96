"""`miles bench` from the command line."""

import json

import pytest

from miles.bench.record import read_results
from miles.bench.table import BENCHMARKS, chosen
from miles.cli import main
from miles.errors import UnknownNameError

QUICK = ["hook", "advantages", "--size", "smoke", "--rounds", "2", "--device", "cpu"]


def bench(*words):
    return main(["bench", *map(str, words)])


def test_two_benchmarks_from_end_to_end(tmp_path, capsys):
    baseline, found = tmp_path / "baseline.json", tmp_path / "found.json"
    assert bench(*QUICK, "--save-baseline", baseline) == 0
    assert list(read_results(baseline).measured) == ["advantages", "hook", "machine"]  # the yardstick, unasked
    out, err = capsys.readouterr()
    assert "hook" in out
    assert "size smoke" in out
    assert f"wrote {baseline}" in err

    halved = json.loads(baseline.read_text())  # a baseline that was a thousand times faster in one of them
    halved["quantities"]["hook"]["rounds"] = [value / 1000 for value in halved["quantities"]["hook"]["rounds"]]
    halved["quantities"]["advantages"]["rounds"] = [1e9, 1e9]
    halved["versions"]["torch"] = "0.1"
    baseline.write_text(json.dumps(halved))
    assert bench(*QUICK, "--baseline", baseline, "--json", found) == 1
    out = capsys.readouterr().out
    assert "regression" in out
    assert "improvement" in out
    assert "torch: 0.1 ->" in out
    assert "machine" in out
    assert len(read_results(found).measured["hook"].rounds) == 2


def test_a_baseline_of_another_size_is_refused(tmp_path, capsys):
    baseline = tmp_path / "baseline.json"
    assert bench("hook", "--size", "smoke", "--rounds", 1, "--warmup", 0, "--save-baseline", baseline) == 0
    assert bench("hook", "--size", "cpu", "--baseline", baseline) == 2
    assert "other workloads" in capsys.readouterr().err


def test_names_stand_for_families():
    assert list(chosen(["hook"])) == ["hook"]
    assert set(chosen(["engine"])) == {"engine_fixed", "engine_variable", "engine_shared_prompt", "engine_score"}
    assert list(chosen([])) == list(BENCHMARKS)
    with pytest.raises(UnknownNameError, match="did you mean 'hook'"):
        chosen(["hok"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--round", "3"], "did you mean --rounds?"),
        (["--rounds", "0"], "a number from 1 on"),
        (["--rounds", "few"], "a number from 1 on"),
        (["engin"], "did you mean 'engine'"),
        (["--size", "huge"], "there are cpu, gpu, smoke"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message, capsys):
    assert bench(*words) == 2
    assert message in capsys.readouterr().err


def test_the_list_and_the_help(capsys):
    assert bench("--list") == 0
    listed = capsys.readouterr().out
    assert [name for name in BENCHMARKS if name not in listed] == []
    assert bench("--help") == 0
    assert "--save-baseline" in capsys.readouterr().out


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path):
    found = tmp_path / "found.json"
    assert bench("--size", "smoke", "--rounds", 1, "--warmup", 0, "--device", "cpu", "--json", found) == 0
    results = read_results(found)
    assert results.errors == {}
    named = {full for name, b in BENCHMARKS.items() if name not in results.skipped for full in b.names(name).values()}
    assert set(results.measured) == named
    assert all(value > 0 for name, m in results.measured.items() for value in m.rounds if "overhead" not in name)
