"""Many reinforcement learning runs of the quickstart, side by side: separate processes of one thread each.

A study says which runs it wants (`Job`) and gets their curves. Data and warm-up of a seed are made once; a run that has
finished with the same flags is not made again; one that fails leaves its log and does not stop the others. It is this
copy of the repository that runs, installed or not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
WARM_UP = "sft"
SETS = {"greedy": "heldout", "sampled": "heldout_sampled"}
"""What a curve calls an evaluation set of grpo.yaml."""
CLOCKS = ("perf/generate_time", "perf/train_time", "perf/sync_time")
"""What is counted as seconds: generating, training and weight sync; not imports, evaluations and dumps."""
USUAL_SECONDS = 50.0
"""Of a run of 60 steps on one thread, for the first estimate."""


@dataclass(frozen=True)
class Job:
    """One run of grpo.yaml."""

    name: str
    """Also its directory, within that of its seed."""
    seed: int
    flags: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Runs of the same seed that must have finished: a teacher."""
    modules: tuple[Path, ...] = ()
    """Folders with modules that the flags name."""

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass
class Curve:
    """Held-out accuracy at some steps, with the seconds of training until then."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, run: Path) -> Curve:
        """From the metrics of a run directory."""
        curve, seconds = cls(), 0.0
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            seconds += sum(row.get(clock, 0.0) for clock in CLOCKS) if row["step"] else 0.0
            accuracy = {name: row.get(f"eval/{set_name}/accuracy") for name, set_name in SETS.items()}
            if None not in accuracy.values():
                curve.steps.append(row["step"])
                curve.seconds.append(round(seconds, 2))
                for name, value in accuracy.items():
                    getattr(curve, name).append(value)
        return curve


class Study:
    """Runs jobs in `out`, at most `at_once` at the same time."""

    def __init__(self, out: Path, at_once: int):
        self.out, self.at_once = out.resolve(), at_once
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = plugin_paths(self.out / "entry-points")
        self.failures: list[str] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Make what is missing. What went wrong is in `failures`."""
        todo = [job for job in jobs if self.curve(job) is None]
        seeds = sorted({job.seed for job in todo if not self._warmed(job.seed)})
        known = [seconds for job in jobs if (seconds := self._seconds(job))]
        each = statistics.median(known) if known else USUAL_SECONDS
        runs = len(todo) + len(seeds)
        minutes = max(runs * each / self.at_once, each * (1 + bool(seeds)) * bool(runs)) / 60
        print(
            f"{len(todo)} of {len(jobs)} runs to make and {len(seeds)} warm-ups, {self.at_once} at once: about "
            f"{minutes:.1f} minutes ({runs * each:.0f} CPU seconds, {each:.0f} a run on one thread)",
            flush=True,
        )
        started = time.monotonic()
        with ThreadPoolExecutor(self.at_once) as pool:
            made: dict[tuple[str, int], Future] = {}
            for seed in seeds:
                made[WARM_UP, seed] = pool.submit(self._warm_up, seed)
            for job in todo:  # those that others wait for were given first, so that no thread waits for one not begun
                waits = [made[name, job.seed] for name in (WARM_UP, *job.after) if (name, job.seed) in made]
                made[job.name, job.seed] = pool.submit(self._run, job, waits)
        for job in todo:
            made[job.name, job.seed].result()
        print(f"{time.monotonic() - started:.0f} seconds", *self.failures, sep="\n", flush=True)

    def save(self, jobs: Sequence[Job]) -> Path:
        """Write `results.json`: the curves of these jobs, and where and with what they were made."""
        curves: dict[str, dict[str, dict]] = {}
        versions: dict[str, str] = {}
        for job in jobs:
            if (curve := self.curve(job)) is not None:
                curves.setdefault(job.name, {})[str(job.seed)] = vars(curve)
                summary = self._folder(job.seed) / job.name / "summary.json"
                versions = json.loads(summary.read_text(encoding="utf-8"))["versions"] if summary.exists() else versions
        made = {"date": f"{date.today()}", "machine": f"{platform.machine()}, {os.cpu_count()} cores", **versions}
        path = self.out / "results.json"
        path.write_text(json.dumps({"made": made, "curves": curves}, indent=1) + "\n", encoding="utf-8")
        return path

    def curve(self, job: Job) -> Curve | None:
        """Of a run that has finished with these flags."""
        found = self._found(job)
        return None if found is None else Curve(**found["curve"])

    def _found(self, job: Job) -> dict | None:
        path = self._folder(job.seed) / f"{job.name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found if found is not None and found["flags"] == list(job.flags) else None

    def _seconds(self, job: Job) -> float | None:
        found = self._found(job)
        return None if found is None else found["whole_seconds"]

    def _folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def _warmed(self, seed: int) -> bool:
        return (self._folder(seed) / WARM_UP / "hf" / "config.json").exists()

    def _warm_up(self, seed: int) -> None:
        folder = self._folder(seed)
        folder.mkdir(exist_ok=True)
        prepare = [sys.executable, str(QUICKSTART / "prepare.py"), "--out", "data", "--seed", str(seed)]
        if not (folder / "data" / "model").exists():
            self._call(prepare, folder, "prepare", ())
        self._call(train("sft.yaml", seed), folder, WARM_UP, ())
        print(f"{'warm-up':<30} seed {seed}", flush=True)

    def _run(self, job: Job, waits: Iterable[Future]) -> None:
        """One run from its beginning to its curve; a failure is noted."""
        folder = self._folder(job.seed)
        try:
            for future in waits:
                future.result()
            missing = [name for name in job.after if not (folder / f"{name}.json").exists()]
            if missing:
                raise RuntimeError(f"{', '.join(missing)} did not finish, which it needs")
            shutil.rmtree(folder / job.name, ignore_errors=True)
            flags = ["--run-dir", job.name, "--run-name", job.name, "--save-interval", "1000000", *job.flags]
            started = time.monotonic()
            self._call(train("grpo.yaml", job.seed, *flags), folder, job.name, job.modules)
            curve, whole = Curve.of(folder / job.name), time.monotonic() - started
        except (OSError, RuntimeError) as error:
            self.failures.append(f"FAILED: {job}: {error}")
            print(self.failures[-1], flush=True)
            return
        record = {"flags": list(job.flags), "whole_seconds": round(whole, 1), "curve": vars(curve)}
        (folder / f"{job.name}.json").write_text(json.dumps(record), encoding="utf-8")
        print(f"{job.name:<30} seed {job.seed}  greedy {curve.greedy[-1]:.3f}  {curve.seconds[-1]:.0f} s", flush=True)

    def _call(self, words: Sequence[str], folder: Path, name: str, modules: Sequence[Path]) -> None:
        """Raises RuntimeError with the end of the log when the process fails."""
        before = os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join([*map(str, (*modules, *self.path)), *([before] if before else [])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        log = folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            file.write(shlex.join(words) + "\n")
            file.flush()
            code = subprocess.run(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise RuntimeError(f"exit code {code}, log {log}\n    " + "\n    ".join(last))


Curves = Mapping[str, Sequence[Curve]]
"""Name of a run -> its curve with each seed."""
Shown = tuple[str, Mapping[str, str]]
"""A table, and name -> chart as SVG."""


def load(results: Path) -> dict[str, list[Curve]]:
    """Name -> curve of each seed, from a `results.json`."""
    found = json.loads(results.read_text(encoding="utf-8"))["curves"]
    return {name: [Curve(**curve) for curve in seeds.values()] for name, seeds in found.items()}


def spread(values: Sequence[float]) -> str:
    """`mean (least to most)`, over seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write(out: Path, table: str, charts: Mapping[str, str]) -> None:
    """Table and charts of a study, for people."""
    (out / "table.md").write_text(table, encoding="utf-8")
    for name, picture in charts.items():
        (out / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(table)


def command(description: str, out: str) -> argparse.ArgumentParser:
    """What the command line of every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    parser.add_argument("--flags", type=shlex.split, default=[], help="for every run, such as '--num-rollout 5'")
    parser.add_argument("--plot-only", type=Path, metavar="RESULTS", help="draw what a results.json holds")
    return parser


def carry_out(args: argparse.Namespace, jobs: Sequence[Job], shown: Callable[[Curves], Shown]) -> int:
    """What a study's command line asks for: make the runs, or only draw; 1 when a run failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plot_only:
        write(args.out, *shown(load(args.plot_only)))
        return 0
    study = Study(args.out, args.jobs)
    study.run(jobs)
    curves = load(study.save(jobs))
    if curves:
        write(args.out, *shown(curves))
    return bool(study.failures)


def train(config: str, seed: int, *flags: str) -> list[str]:
    """The command of a job of the quickstart."""
    seeds = ["--seed", str(seed), "--rollout-seed", str(seed)]
    return [sys.executable, "-m", "miles", "train", str(QUICKSTART / config), *seeds, *flags]


def plugin_paths(folder: Path) -> list[Path]:
    """What must be on the path so that this copy of the repository is used, installed or not: its folders, and
    `folder`, where the entry points of what is not installed are written down as an installer would."""
    paths = [folder]
    for pyproject in (ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/*/pyproject.toml"))):
        paths.append(pyproject.parent)
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        try:
            distribution(project["name"])
        except PackageNotFoundError:
            info = folder / f"{project['name'].replace('-', '_')}-0.1.0.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
            points = project.get("entry-points", {}).get("miles", {})
            lines = [f"{name} = {value}" for name, value in points.items()]
            (info / "entry_points.txt").write_text("\n".join(["[miles]", *lines, ""]))
    return paths
