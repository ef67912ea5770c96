"""Every algorithm of algorithms.yaml on the quickstart's task: held-out accuracy against rollouts and seconds.

    python examples/algorithms/study.py --jobs 16                       # everything, three seeds
    python examples/algorithms/study.py --only grpo rloo --seeds 1      # some of it
    python examples/algorithms/study.py --plot-only results.json        # table and charts of a study made elsewhere

Writes into `--out`: results.json, table.md, by_rollouts.svg and by_seconds.svg. Runs are processes of one thread each,
as many at a time as `--jobs` says; what finished with the same flags is not made again. Exits with 1 when a run failed.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from chart import COLORS, Line, Panel, chart  # noqa: E402
from quickstart_runs import Curve, Curves, Job, Shown, carry_out, command, spread  # noqa: E402

REFERENCE = "grpo"
"""Stands behind every other in the charts."""
EVALUATE = ("--eval-interval", "2")
GOOD = 0.9
"""Greedy accuracy that the table counts rollouts to."""


@dataclass(frozen=True)
class Algorithm:
    """One entry of algorithms.yaml."""

    name: str
    flags: str = ""
    exception: str = ""
    """What differs from the recipe besides the algorithm, and why."""
    after: tuple[str, ...] = ()
    """Algorithms whose runs this one needs."""

    def job(self, seed: int, more: Sequence[str]) -> Job:
        """Its run with this seed; `more` flags come first."""
        return Job(self.name, seed, (*more, *shlex.split(self.flags)), tuple(self.after))


def algorithms() -> list[Algorithm]:
    """All of them, in the order of the file."""
    return [Algorithm(**entry) for entry in yaml.safe_load((HERE / "algorithms.yaml").read_text(encoding="utf-8"))]


# ------------------------------------------------------------------------------------------------------ what came of it


def rollouts_to(curve: Curve, accuracy: float) -> int | None:
    """The first evaluated step at which greedy accuracy was as good as this."""
    return next((step for step, found in zip(curve.steps, curve.greedy, strict=True) if found >= accuracy), None)


def table(results: Curves, known: Mapping[str, Algorithm]) -> str:
    """Markdown: accuracy at the end, rollouts until it was good, seconds; over seeds."""
    start = [accuracy for curves in results.values() for curve in curves for accuracy in curve.greedy[:1]]
    lines = [
        f"| algorithm | greedy | sampled | rollouts to {GOOD} | seconds | flags |",
        "|---|---|---|---|---|---|",
        f"| none: the warm-up | {spread(start)} | | | | |",
    ]
    for name, curves in results.items():
        reached = [rollouts_to(curve, GOOD) for curve in curves]
        to_good = ", ".join("never" if steps is None else str(steps) for steps in reached)
        ends = {key: spread([getattr(curve, key)[-1] for curve in curves]) for key in ("greedy", "sampled")}
        seconds = f"{statistics.mean(curve.seconds[-1] for curve in curves):.0f}"
        about = known.get(name)
        flags = f"`{about.flags}`" if about and about.flags else ""
        if about and about.exception:
            flags += f" ({about.exception})"
        lines.append(f"| {name} | {ends['greedy']} | {ends['sampled']} | {to_good} | {seconds} | {flags} |")
    return "\n".join(lines) + "\n"


def over_seeds(curves: Sequence[Curve], x: str, y: str) -> list[tuple[float, float, float, float]]:
    """Points for a line: mean of x; mean, least and most of y, at each step that all seeds have."""
    points = []
    for i in range(min(len(curve.steps) for curve in curves)):
        values = [getattr(curve, y)[i] for curve in curves]
        points.append(
            (
                statistics.mean(getattr(curve, x)[i] for curve in curves),
                statistics.mean(values),
                min(values),
                max(values),
            )
        )
    return points


def panels(results: Curves, x: str) -> list[Panel]:
    """One an algorithm."""
    found = []
    for name, curves in results.items():
        lines = [
            Line("greedy", COLORS[0], over_seeds(curves, x, "greedy")),
            Line("sampled", COLORS[1], over_seeds(curves, x, "sampled"), dashed=True),
        ]
        if name != REFERENCE and REFERENCE in results:
            behind = over_seeds(results[REFERENCE], x, "greedy")
            lines.append(Line(f"greedy of {REFERENCE}", COLORS[-1], behind, faint=True))
        found.append(Panel(name, lines))
    return found


def shown(results: Curves) -> Shown:
    """The table, and name -> chart as SVG."""
    title = "Held-out accuracy, mean and range over seeds, against "
    charts = {
        f"by_{words.split()[0]}": chart(panels(results, x), title + words, unit)
        for x, words, unit in (("steps", "rollouts", "rollouts"), ("seconds", "seconds of training", "s"))
    }
    return table(results, {algorithm.name: algorithm for algorithm in algorithms()}), charts


def main() -> int:
    parser = command(__doc__, "runs/algorithms")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in algorithms()])
    args = parser.parse_args()
    chosen = [algorithm for algorithm in algorithms() if not args.only or algorithm.name in args.only]
    more = (*EVALUATE, *args.flags)
    return carry_out(args, [algorithm.job(seed, more) for algorithm in chosen for seed in args.seeds], shown)


if __name__ == "__main__":
    sys.exit(main())
