"""The quickstart on several seeds, with the controls that say what it is that makes accuracy rise.

    python study.py --out runs/quickstart-study --seeds 1 2 3 4 5

For each seed: data and warm-up as in run.sh, then, from the same warmed-up model,

    GRPO               the recipe
    learning rate 0    the same rollouts, no learning
    shuffled rewards   the rewards of each batch are dealt out at random
    SFT alone          the warm-up goes on, for as many seconds as GRPO took

and a table of held-out accuracy, greedy and sampled, as Markdown. A finished run is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import miles
from miles.api import hookimpl

HERE = Path(__file__).resolve().parent
ROWS = ("GRPO", "learning rate 0", "shuffled rewards", "SFT alone")


class ShuffledRewards:
    """Deals the rewards of a batch out at random, before advantages are computed."""

    @hookimpl
    def miles_modify_samples(self, step, groups):
        samples = [sample for group in groups for sample in group.samples]
        rewards = [sample.reward for sample in samples]
        random.Random(step).shuffle(rewards)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward


def train(config: str, name: str, seed: int, plugins: Sequence[object] = (), **flags) -> dict:
    """Run one job in the working directory, unless it has finished already; returns its summary."""
    done = Path(name) / "summary.json"
    if not (done.exists() and json.loads(done.read_text())["status"] == "completed"):
        flags = {"seed": seed, "rollout_seed": seed, **flags}
        miles.train(HERE / config, plugins=plugins, run_dir=name, run_name=name, **flags)
    return json.loads(done.read_text())


def study_seed(seed: int) -> dict[str, dict]:
    """Row -> summary of its run."""
    if not Path("data/model").exists():
        subprocess.run([sys.executable, HERE / "prepare.py", "--out", "data", "--seed", str(seed)], check=True)
    warm_up = train("sft.yaml", "sft", seed)
    grpo = train("grpo.yaml", "grpo", seed)
    sft_steps = math.ceil(grpo["seconds"] / (warm_up["seconds"] / warm_up["steps"]))
    at_the_ends = {"eval_interval": 1000}
    return {
        "GRPO": grpo,
        "learning rate 0": train("grpo.yaml", "lr0", seed, lr=0.0, **at_the_ends),
        "shuffled rewards": train("grpo.yaml", "shuffled", seed, [ShuffledRewards()], **at_the_ends),
        "SFT alone": train("more_sft.yaml", "more-sft", seed, num_rollout=sft_steps),
    }


def table(results: dict[int, dict[str, dict]]) -> str:
    """Greedy / sampled accuracy on held-out sums, a column a seed."""

    def cell(summary: dict, when: str) -> str:
        return " / ".join(f"{summary['evaluation'][s][when]['accuracy']:.3f}" for s in ("heldout", "heldout_sampled"))

    lines = [f"| | {' | '.join(f'seed {seed}' for seed in results)} |", f"|---|{'---|' * len(results)}"]
    rows = {"after the warm-up": ("GRPO", "first"), **{row: (row, "last") for row in ROWS}}
    for row, (run, when) in rows.items():
        lines.append(f"| {row} | {' | '.join(cell(result[run], when) for result in results.values())} |")
    for row in ("GRPO", "SFT alone"):
        seconds = [f"{result[row]['seconds']:.0f} s" for result in results.values()]
        lines.append(f"| seconds of {row} | {' | '.join(seconds)} |")
    return "\n".join(lines)


def overhead(folder: Path) -> float:
    """Median share of a GRPO step that was neither generation nor training."""
    lines = (folder / "grpo" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(r["perf/overhead_share"] for r in map(json.loads, lines) if "perf/overhead_share" in r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    out, results = args.out.resolve(), {}
    for seed in args.seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        results[seed] = study_seed(seed)
    shares = [overhead(out / f"seed-{seed}") for seed in args.seeds]
    text = f"{table(results)}\n\nneither generation nor training: {max(shares):.1%} of a step at most\n"
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
