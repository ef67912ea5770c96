"""Rollouts that are 0, 1, 4 and 16 updates old, with every correction of corrections.yaml, on the quickstart's task.

    python examples/staleness/study.py --jobs 16
    python examples/staleness/study.py --only none tis --lags 0 16 --seeds 1
    python examples/staleness/study.py --plot-only results.json

Writes into `--out`: results.json, table.md and by_rollouts.svg. Runs are processes of one thread each; what finished
with the same flags is not made again. Exits with 1 when a run failed.

An update is a rollout's: four optimizer steps. The engine always has the weights of `lag` updates ago (delayed.py), so
evaluations see these too: a run is `lag` rollouts longer than one without, and all are compared by what they had
learned from the same number of rollouts.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "algorithms"))
from chart import COLORS, Line, Panel, chart  # noqa: E402
from quickstart_runs import Curve, Curves, Job, Shown, carry_out, command, spread  # noqa: E402

ROLLOUTS = 60
RECIPE = ("--eval-interval", "4", "--weight-sync", "delayed:Delayed")
"""What differs from the quickstart's recipe in every run. Its learning rate is such that old rollouts hurt."""
MEASURES: dict[str, Callable[[Curve], float]] = {
    "greedy, at the end": lambda curve: curve.greedy[-1],
    "sampled, at the end": lambda curve: curve.sampled[-1],
    "greedy, mean on the way": lambda curve: statistics.mean(curve.greedy),
}
"""What the tables say of a run."""
Results = Mapping[str, Mapping[int, Sequence[Curve]]]
"""Correction -> lag -> the curve of each seed, by rollouts learned from."""


def corrections() -> dict[str, dict[str, str]]:
    """Name -> flags and what they mean, in the order of the file."""
    entries = yaml.safe_load((HERE / "corrections.yaml").read_text(encoding="utf-8"))
    return {entry.pop("name"): entry for entry in entries}


def job(correction: str, lag: int, seed: int, more: Sequence[str] = ()) -> Job:
    """The run of one cell; `more` flags come first."""
    own = shlex.split(corrections()[correction]["flags"])
    length = ("--num-rollout", str(ROLLOUTS + lag), f"--weight-sync.transport.lag={lag}")
    return Job(f"{correction}-lag{lag}", seed, (*RECIPE, *length, *more, *own), modules=(HERE,))


def learned(curve: Curve, lag: int) -> Curve:
    """By rollouts that the evaluated policy had learned from, which are `lag` fewer than were made."""
    first = max((i for i, step in enumerate(curve.steps) if step <= lag), default=0)
    columns = {name: values[first:] for name, values in vars(curve).items()}
    return Curve(**{**columns, "steps": [max(0, step - lag) for step in columns["steps"]]})


def arranged(found: Curves) -> Results:
    """From the names of runs to the cells of the table."""
    cells: dict[str, dict[int, list[Curve]]] = {}
    for name, curves in found.items():
        correction, _, lag = name.rpartition("-lag")
        cells.setdefault(correction, {})[int(lag)] = [learned(curve, int(lag)) for curve in curves]
    return cells


def table(results: Results) -> str:
    """Markdown: one table a measure, a row a correction, a column a lag; mean and range over seeds."""
    parts = []
    for title, number in MEASURES.items():
        lags = sorted({lag for cells in results.values() for lag in cells})
        lines = [f"| {title} | {' | '.join(f'{lag} updates old' for lag in lags)} |", f"|---|{'---|' * len(lags)}"]
        for name, cells in results.items():
            texts = [spread([number(curve) for curve in cells[lag]]) if lag in cells else "" for lag in lags]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def picture(results: Results) -> str:
    """SVG: one panel a lag, one line a correction."""
    panels = []
    for lag in sorted({lag for cells in results.values() for lag in cells}):
        lines = []
        for color, (name, cells) in zip(COLORS, results.items(), strict=False):
            curves = cells.get(lag)
            if curves:
                points = [
                    (step, statistics.mean(values), min(values), max(values))
                    for step, *values in zip(curves[0].steps, *(curve.greedy for curve in curves), strict=True)
                ]
                lines.append(Line(name, color, points))
        panels.append(Panel(f"{lag} updates old", lines))
    return chart(
        panels, "Greedy accuracy on held-out sums, by rollouts learned from", "rollouts", columns=2, size=(360, 200)
    )


def shown(found: Curves) -> Shown:
    """The table, and name -> chart as SVG."""
    results = arranged(found)
    return table(results), {"by_rollouts": picture(results)}


def main() -> int:
    parser = command(__doc__, "runs/staleness")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--only", nargs="+", choices=list(corrections()), default=list(corrections()))
    args = parser.parse_args()
    cells = [(name, lag, seed) for name in args.only for lag in args.lags for seed in args.seeds]
    return carry_out(args, [job(*cell, more=args.flags) for cell in cells], shown)


if __name__ == "__main__":
    sys.exit(main())
