"""The whole step: the main job end to end, as `miles train` runs it."""

from __future__ import annotations

import io
import itertools
import json
from contextlib import redirect_stderr
from statistics import median

from miles.bench.engine import NEEDS
from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import Workbench
from miles.jobs import run_job
from miles.rundir import METRICS

FREQUENTLY = 1 << 20
"""Steps between checkpoints: there is one at the end only."""
AROUND = 2
"""Steps that are not timed: the first warms up, and the last saves a checkpoint."""


async def main_job(bench: Workbench) -> Round:
    """A job of some steps, built anew in every round; medians over its steps, by the run's own clock."""
    runs = itertools.count()

    async def once() -> dict[str, float]:
        resolved = bench.resolve(
            f"job-{next(runs)}",
            {
                "rollout.num_rollout": bench.size.job_steps + AROUND,
                "rollout.dump_samples": 0,
                "checkpoint.interval": FREQUENTLY,
            },
        )
        with redirect_stderr(io.StringIO()):
            run = await run_job(resolved)
        lines = (run.directory / METRICS).read_text().splitlines()
        steps = [json.loads(line) for line in lines][AROUND : AROUND + bench.size.job_steps]
        seconds = median(step["perf/step_time"] for step in steps)
        return {
            OWN: run.config.rollout.batch_size * run.config.rollout.n_samples_per_prompt / seconds,
            "tokens": median(step["rollout/generated_tokens"] for step in steps) / seconds,
            "overhead": 100 * median(step["perf/overhead_share"] for step in steps),
        }

    return once


BENCHMARKS = {
    "main_job": Benchmark(
        "GRPO, 8 prompts x 8 samples x 64 tokens a step; overhead: neither generation nor training",
        {
            OWN: Quantity("samples/s", "higher"),
            "tokens": Quantity("tokens/s", "higher"),
            "overhead": Quantity("%", "lower"),
        },
        main_job,
        NEEDS,
    )
}
