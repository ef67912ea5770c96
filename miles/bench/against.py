"""The torch engine against transformers' own generation: the same model and workloads, in turns.

Each side has a process of its own. In one process they would disturb each other: torch keeps a team of threads for
every thread that computes, and more members than cores slow all of them down. transformers' side is `opponent`. The
engine also returns log-probabilities, and makes its draws independent of the batch; transformers does neither here.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict

from miles.bench.engine import NEEDS, TOKENS, WORKLOADS, Draw, Workload, seconds_of
from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import Workbench
from miles.errors import EngineError

RATIO = Quantity("times", "higher")
THEIRS = "transformers"


class Opponent:
    """A process that generates with transformers."""

    def __init__(self, kind: str, bench: Workbench):
        about = {
            "kind": kind, "checkpoint": str(bench.checkpoint), "device": bench.device, "dtype": bench.size.dtype,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "miles.bench.opponent", json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; it ends with its input
        )

    def seconds_of(self, work: Workload) -> float:
        """Raises EngineError when the process has died; it has said why."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(asdict(work)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise EngineError(f"transformers' process ended with code {self.process.wait()}; see above")
        return float(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def opponent(kind: str, bench: Workbench) -> Opponent:
    """The process of this kind; all contests of a call share it."""
    if kind not in bench.opponents:
        bench.opponents[kind] = made = Opponent(kind, bench)
        bench.stack.callback(made.close)
    return bench.opponents[kind]


def contest(about: str, draw: Draw, kind: str, needs: tuple[str, ...] = ()) -> Benchmark:
    """Both sides generate the same workload in each round; who begins changes every round."""

    async def prepare(bench: Workbench) -> Round:
        engine, other, rounds = await bench.engine(), opponent(kind, bench), itertools.count()

        async def once() -> dict[str, float]:
            work = draw(bench)
            if next(rounds) % 2:
                theirs = other.seconds_of(work)
                ours = await seconds_of(engine, work, bench)
            else:
                ours = await seconds_of(engine, work, bench)
                theirs = other.seconds_of(work)
            return {OWN: theirs / ours, THEIRS: work.tokens / theirs}

        return once

    quantities = {OWN: RATIO, THEIRS: Quantity(TOKENS.unit, "neither")}
    return Benchmark(f"torch engine / transformers' {about}", quantities, prepare, (*NEEDS, *needs))


BENCHMARKS = {
    **{f"vs_generate_{name}": contest(f"generate: {w}", draw, "generate") for name, (draw, w) in WORKLOADS.items()},
    **{
        f"vs_batching_{name}": contest(f"continuous batching: {w}", draw, "batching", ("psutil",))
        for name, (draw, w) in WORKLOADS.items()
    },
}
