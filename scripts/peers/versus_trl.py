"""miles against TRL's GRPOTrainer on a CPU, in turns: a rollout and optimizer step of one, then of the other.

    scripts/peers/install.sh trl
    python scripts/peers/versus_trl.py [fixed variable shared_prompt] [--steps 20] [--seeds 0] [--json FILE]
    python scripts/peers/versus_trl.py --learning --seeds 0 1 2

Both run the whole time in processes of their own and wait for their turn, so that both see the same machine. Speed is
the median over steps, the first few left out; `tokens` are those that are trained on, padding does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

from task import SETTINGS, Task

HERE = Path(__file__).resolve().parent
TRL_PYTHON = HERE.parents[1] / ".peers/trl/bin/python"
WARM_UP = 3
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
SIDES = {"miles": (sys.executable, "miles_side.py"), "trl": (str(TRL_PYTHON), "trl_side.py")}


class Side:
    """One of the two programs."""

    def __init__(self, name: str, folder: Path, task: Task, steps: int, seed: int):
        python, script = SIDES[name]
        self.name, self.log = name, folder / f"{name}.log"
        arguments = {"folder": str(folder), "task": asdict(task), "steps": steps, "seed": seed}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, json.dumps(arguments)],
                cwd=HERE,
                env=os.environ | QUIET,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.ready = self._answer()["ready"]
        self.steps: list[dict] = []

    def take_turn(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._answer())

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{") and ("ready" in line or "seconds" in line):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def seconds(self) -> float:
        return median(step["seconds"] for step in self.steps[WARM_UP:])

    def speed(self) -> float:
        """Tokens per second of the median step; a step's own number of tokens differs where lengths do."""
        return median(step["tokens"] / step["seconds"] for step in self.steps[WARM_UP:])

    def generating(self) -> float:
        return median(step["generating"] / step["seconds"] for step in self.steps[WARM_UP:])

    def reward(self) -> float:
        return mean(step["reward"] for step in self.steps[-5:])


def play(task: Task, steps: int, seed: int) -> dict[str, Side]:
    """Both sides, in turns; who begins changes from step to step."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        task.write(Path(folder), seed)
        sides = {name: Side(name, Path(folder), task, steps, seed) for name in SIDES}
        for side in sides.values():
            stack.callback(side.end)
        for step in range(steps):
            for side in sorted(sides.values(), key=lambda side: side.name, reverse=bool(step % 2)):
                side.take_turn()
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all when not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--learning", action="store_true", help="40 steps of `fixed` a seed, and the reward they end at"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if unknown := set(given.settings) - set(SETTINGS):
        parser.error(f"no setting {unknown.pop()!r}; there are {', '.join(SETTINGS)}")
    if not TRL_PYTHON.exists():
        sys.exit(f"{TRL_PYTHON} is not there; run scripts/peers/install.sh trl")
    results = []
    names = ["fixed"] if given.learning else given.settings or list(SETTINGS)
    print("| setting | seed | | s/step | tokens/s | generating | reward, first -> last 5 steps |\n" + "|---" * 7 + "|")
    for name in names:
        task = SETTINGS[name]
        for seed in given.seeds:
            sides = play(task, 40 if given.learning else given.steps, seed)
            for side in sides.values():
                print(
                    f"| {name} | {seed} | {side.name} | {side.seconds():.3f} | {side.speed():,.0f} "
                    f"| {side.generating():.0%} | {side.steps[0]['reward']:.3f} -> {side.reward():.3f} |"
                )
            ratio = sides["miles"].speed() / sides["trl"].speed()
            print(f"| {name} | {seed} | ratio | | **{ratio:.2f}** | | |", flush=True)
            results.append(
                {"setting": name, "seed": seed, "task": asdict(task), "ratio": ratio}
                | {side.name: {"version": side.ready, "steps": side.steps} for side in sides.values()}
            )
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
