"""examples/algorithms: its table of algorithms, which runs are made, and what is said of their results."""

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, distributions
from pathlib import Path
from xml.etree import ElementTree

import pytest

from miles.config.load import resolve
from miles.plugins import load_plugins

FOLDER = Path(__file__).parents[2] / "examples" / "algorithms"
RECIPE = FOLDER.parent / "quickstart" / "grpo.yaml"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


runs = load("quickstart_runs")
charts = load("chart")
study = load("study")
Curve, Job = runs.Curve, runs.Job


@pytest.mark.parametrize("algorithm", study.algorithms(), ids=lambda algorithm: algorithm.name)
def test_flags_of_an_algorithm_are_accepted(algorithm):
    job = algorithm.job(1, study.EVALUATE)
    resolve([RECIPE], job.flags, load_plugins())


def test_an_algorithm_stands_after_those_it_needs():
    before = []
    for algorithm in study.algorithms():
        assert algorithm.name not in before
        assert set(algorithm.after) <= set(before)
        before.append(algorithm.name)


# -------------------------------------------------------------------------------------------------------- making runs


def metrics(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def evaluated(step, greedy, sampled, **clocks):
    sets = {"eval/heldout/accuracy": greedy, "eval/heldout_sampled/accuracy": sampled}
    return {"step": step, **sets, **{f"perf/{name}_time": value for name, value in clocks.items()}}


def test_a_curve_counts_the_seconds_of_steps_not_of_evaluations(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        metrics(
            evaluated(0, 0.1, 0.2, sync=5.0),
            {"step": 1, "perf/generate_time": 1.0, "perf/train_time": 2.0, "perf/sync_time": 0.5},
            evaluated(2, 0.3, 0.4, generate=1.0, train=2.0, sync=0.25, rollout=90.0),
        )
    )
    assert Curve.of(tmp_path) == Curve([0, 2], [0.0, 6.75], [0.1, 0.3], [0.2, 0.4])


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A study whose processes only write down their words, and fail when these name a run called `bad`."""
    calls = []

    def call(self, words, folder, name, modules):
        calls.append((name, folder.name))
        if name == "bad":
            raise RuntimeError("exit code 2")
        if name == "sft":
            (folder / "sft" / "hf").mkdir(parents=True)
            (folder / "sft" / "hf" / "config.json").touch()
        elif name != "prepare":
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text(metrics(evaluated(0, 0.1, 0.1), evaluated(2, 0.5, 0.5)))

    monkeypatch.setattr(runs.Study, "_call", call)
    return runs.Study(tmp_path, at_once=2), calls


def test_data_and_warm_up_are_shared_and_a_finished_run_is_not_made_again(recorded, tmp_path):
    made, calls = recorded
    jobs = [Job(name, seed, ("--lr", "1e-4")) for name in ("one", "two") for seed in (1, 2)]
    made.run(jobs)
    assert sorted(calls) == sorted(
        (name, f"seed-{seed}") for name in ("prepare", "sft", "one", "two") for seed in (1, 2)
    )
    calls.clear()
    made.run([*jobs, Job("three", 1)])
    assert calls == [("three", "seed-1")]
    calls.clear()
    made.run([Job("one", 1, ("--lr", "2e-4"))])
    assert calls == [("one", "seed-1")]
    curve = Curve([0, 2], [0.0, 0.0], [0.1, 0.5], [0.1, 0.5])
    assert runs.load(made.save([*jobs, Job("three", 1)])) == {"one": [curve], "two": [curve, curve], "three": [curve]}


def test_a_run_that_fails_stops_only_those_that_need_it(recorded, capsys):
    made, calls = recorded
    made.run([Job("bad", 1), Job("needs it", 1, after=("bad",)), Job("good", 1)])
    assert [name for name, _ in calls] == ["prepare", "sft", "bad", "good"]
    assert len(made.failures) == 2
    assert "bad, seed 1: exit code 2" in made.failures[0]
    assert "needs it, seed 1: bad did not finish" in made.failures[1]
    assert made.curve(Job("good", 1)) is not None
    assert made.curve(Job("bad", 1)) is None


def test_the_log_of_a_process_that_fails_is_quoted(tmp_path):
    made = runs.Study(tmp_path, at_once=1)
    words = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS']); raise SystemExit('no luck')"]
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1, log .*\n    1\n    no luck"):
        made._call(words, tmp_path, "job", ())


def test_this_copy_of_the_repository_is_used_installed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "distribution", lambda name: name)
    assert runs.ROOT / "plugins" / "algorithms" / "miles-grpo" in runs.plugin_paths(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(runs, "distribution", missing)
    assert runs.plugin_paths(tmp_path)[0] == tmp_path
    found = {d.name: {point.name: point.value for point in d.entry_points} for d in distributions(path=[str(tmp_path)])}
    assert found["miles"] == {"builtin": "miles.builtins.plugin"}
    assert found["miles-grpo"] == {"grpo": "miles_grpo.plugin"}


# ----------------------------------------------------------------------------------------------------------- results

CURVES = [
    Curve([0, 2, 4], [0.0, 3.0, 6.0], [0.1, 0.92, 0.8], [0.2, 0.5, 0.7]),
    Curve([0, 2, 4], [0.0, 5.0, 9.0], [0.2, 0.4, 0.6], [0.2, 0.4, 0.5]),
]


def test_the_table_has_means_ranges_and_rollouts_until_it_was_good():
    about = study.Algorithm("rloo", "--advantage-estimator rloo", exception="lr 1e-4: diverges otherwise")
    lines = study.table({"rloo": CURVES}, {"rloo": about}).splitlines()
    assert lines[2] == "| none: the warm-up | 0.150 (0.100 to 0.200) | | | | |"
    assert lines[3] == (
        "| rloo | 0.700 (0.600 to 0.800) | 0.600 (0.500 to 0.700) | 2, never | 8 | "
        "`--advantage-estimator rloo` (lr 1e-4: diverges otherwise) |"
    )


def test_points_over_seeds():
    assert study.over_seeds(CURVES, "seconds", "greedy")[1] == (4.0, pytest.approx(0.66), 0.4, 0.92)
    assert [point[0] for point in study.over_seeds([*CURVES, Curve([0], [0.0], [0.1], [0.1])], "steps", "greedy")] == [
        0
    ]


def test_a_study_made_elsewhere_is_drawn(tmp_path, capsys, monkeypatch):
    curves = {name: {"1": vars(CURVES[0]), "2": vars(CURVES[1])} for name in ("grpo", "a<b")}
    (tmp_path / "results.json").write_text(json.dumps({"made": {}, "curves": curves}))
    out = tmp_path / "drawn"
    words = ["study.py", "--plot-only", str(tmp_path / "results.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert study.main() == 0
    assert (out / "table.md").read_text() in capsys.readouterr().out
    for name in ("by_rollouts.svg", "by_seconds.svg"):
        root = ElementTree.fromstring((out / name).read_text())
        titles = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"grpo", "a<b", "greedy", "sampled"} <= set(titles)


def test_a_chart_puts_points_where_they_belong():
    line = charts.Line("it", "#123456", [(0, 0.0, 0.0, 0.0), (10, 0.5, 0.25, 1.0)])
    text = charts.chart([charts.Panel("one", [line])], "title", "steps", size=(200, 100))
    assert '<polyline points="0.0,100.0 200.0,50.0"' in text
    assert '<polygon points="0.0,100.0 200.0,0.0 200.0,75.0 0.0,100.0"' in text
    assert ">10 steps</text>" in text
