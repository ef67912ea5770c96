"""Medians, spreads and verdicts, on made-up numbers."""

import json
import math

import pytest

from miles.bench.compare import Change, compare
from miles.bench.measure import Benchmark, Circumstances, Measured, Quantity
from miles.bench.record import SCHEMA, Results, read_results
from miles.errors import ConfigError


def measured(*rounds, better="higher"):
    return Measured("tokens/s", better, list(rounds))


def change(before, now, noise=0.0, better="higher"):
    return Change("x", "s", before, now, noise, better)


def test_median_and_interquartile_range():
    found = measured(5.0, 1.0, 3.0, 2.0, 4.0)
    assert found.median == 3.0
    assert found.spread == 2.0  # quarters of 1..5 lie at 2 and 4
    assert measured(1.0, 2.0, 3.0, 1000.0, 2.5).spread == 1.0  # an outlier does not count: 2, 2.5, 3
    assert measured(7.0).spread == 0.0


def test_names_of_quantities():
    unit = Quantity("s", "lower")
    assert Benchmark("", {"": unit, "tokens": unit}, None).names("job") == {"": "job", "tokens": "job/tokens"}


@pytest.mark.parametrize(
    ("before", "now", "noise", "better", "verdict"),
    [
        (100.0, 94.0, 0.0, "higher", "regression"),
        (100.0, 96.0, 0.0, "higher", "same"),
        (100.0, 95.0, 0.0, "higher", "same"),  # exactly 5 %
        (100.0, 106.0, 0.0, "higher", "improvement"),
        (100.0, 106.0, 0.0, "lower", "regression"),
        (100.0, 94.0, 0.0, "lower", "improvement"),
        (100.0, 90.0, 12.0, "higher", "within noise"),
        (100.0, 90.0, 9.0, "higher", "regression"),
        (100.0, 50.0, 0.0, "neither", "changed"),
        (0.0, 1.0, 0.0, "lower", "regression"),
        (0.0, 0.0, 0.0, "lower", "same"),
    ],
)
def test_a_change_must_pass_both_tests(before, now, noise, better, verdict):
    assert change(before, now, noise, better).verdict == verdict


def test_relative_change():
    assert change(200.0, 150.0).relative == -0.25
    assert change(0.0, 1.0).relative == math.inf
    assert change(0.0, -1.0).relative == -math.inf
    assert change(-10.0, -5.0).relative == 0.5


def test_noise_is_that_of_both_sides():
    before, now = measured(98.0, 100.0, 102.0), measured(85.0, 90.0, 95.0)  # quarters 99..101 and 87.5..92.5
    (found,) = compare({"x": before}, {"x": now}, {}, {}).changes
    assert found.noise == 2.0 + 5.0
    assert (found.before, found.now) == (100.0, 90.0)
    assert found.verdict == "regression"
    (found,) = compare({"x": measured(94.0, 100.0, 106.0)}, {"x": now}, {}, {}).changes
    assert found.verdict == "within noise"  # 6 + 5 is more than 10


def test_what_is_on_one_side_alone():
    found = compare(
        {"gone": measured(1.0), "both": measured(1.0)}, {"both": measured(1.0), "new": measured(2.0)}, {}, {}
    )
    assert (found.missing, found.added) == (("gone",), ("new",))
    assert [change.name for change in found.changes] == ["both"]
    assert found.regressions == []


def test_other_circumstances_are_told():
    before = {"torch": "2.12.0", "cores": 2, "gpu": None}
    assert compare({}, {}, before, {**before, "torch": "2.13.0"}).differences == ("torch: 2.12.0 -> 2.13.0",)
    assert compare({}, {}, before, {"torch": "2.12.0", "cores": 2}).differences == ()
    assert compare({}, {}, before, dict(before)).differences == ()


def results(**changes):
    given = {"versions": {"torch": "2.13.0"}, "machine": {"cpu": "abacus", "cores": 2}, "size": "cpu", "device": "cpu"}
    return Results(**{**given, **changes})


def test_results_survive_the_disk(tmp_path):
    found = results(
        measured={"x": measured(1.0, 2.0, 4.0)},
        circumstances={"x": Circumstances(seconds=[0.1, 0.2, 0.3], contention=[0.0, 0.5, 0.0])},
        skipped={"y": "needs psutil"},
        interrupted=True,
    )
    found.write(tmp_path / "new" / "results.json")
    assert read_results(tmp_path / "new" / "results.json") == found
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["schema"] == SCHEMA
    assert written["quantities"]["x"] == {
        "unit": "tokens/s", "better": "higher", "rounds": [1.0, 2.0, 4.0], "median": 2.0, "spread": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is no JSON"),
        ("[]", "schema None"),
        ('{"schema": 0}', "schema 0"),
        (f'{{"schema": {SCHEMA}}}', "lacks something"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_results(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--save-baseline"):
        read_results(tmp_path / "nothing.json")


def test_only_whole_results_make_a_baseline():
    assert results().whole
    assert not results(interrupted=True).whole
    assert not results(errors={"x": "ValueError"}).whole
