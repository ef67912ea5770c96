"""Every benchmark by its name. Written down here: plugins cannot add any."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from miles.bench import against, engine, main_job, plumbing, training
from miles.bench.measure import Benchmark
from miles.errors import UnknownNameError

BENCHMARKS: dict[str, Benchmark] = {
    **main_job.BENCHMARKS,
    **engine.BENCHMARKS,
    **against.BENCHMARKS,
    **training.BENCHMARKS,
    **plumbing.BENCHMARKS,
}


def chosen(names: Sequence[str]) -> dict[str, Benchmark]:
    """Those of these names, in the table's order; all of them when none is given. `engine` stands for `engine_...`.

    Raises:
        UnknownNameError: a name that is nobody's.
    """
    for name in names:
        if not any(_meant(name, known) for known in BENCHMARKS):
            close = get_close_matches(name, _understood(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(BENCHMARKS)}"
            raise UnknownNameError(f"no benchmark is called {name!r}; {hint}")
    return {
        known: benchmark
        for known, benchmark in BENCHMARKS.items()
        if not names or any(_meant(name, known) for name in names)
    }


def _understood() -> list[str]:
    """Every name and every beginning of one that stands for a family."""
    beginnings = {name.rsplit("_", cut)[0] for name in BENCHMARKS for cut in range(1, 1 + name.count("_"))}
    return [*BENCHMARKS, *beginnings]


def _meant(name: str, known: str) -> bool:
    return known == name or known.startswith(f"{name}_")
