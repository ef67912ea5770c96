"""miles on the same folder, one rollout a turn. Run by versus_trl.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from task import Task, Turns, digits

import miles


class TakesTurns:
    """A tracker is told of every finished step: the place to wait for the next turn."""

    def __init__(self, turns: Turns):
        self.turns = turns
        self.started = 0.0

    def start(self, run) -> None:
        pass

    def log(self, step: int, metrics) -> None:
        seconds = time.perf_counter() - self.started
        if step:
            self.turns.give(
                seconds=seconds,
                tokens=metrics["rollout/generated_tokens"],
                generating=metrics["perf/generate_time"],
                reward=metrics["rollout/reward"],
            )
        else:
            versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
            self.turns.give(ready=f"miles {miles.__version__}, {versions}")
        self.turns.take()
        self.started = time.perf_counter()

    def finish(self, status: str) -> None:
        pass


def main(folder: Path, task: Task, steps: int, seed: int) -> None:
    global tracker
    tracker = TakesTurns(Turns())
    config = {
        "run": {"dir": str(folder / "miles"), "seed": seed, "resume": "never"},
        "model": {"hf_checkpoint": str(folder / "model")},
        "data": {
            "sets": [
                {"path": str(folder / "prompts.jsonl"), "sampling": {"max_new_tokens": task.response_len}},
            ],
            "shuffle": True,
            "seed": seed,
        },
        "rollout": {
            "num_rollout": steps,
            "batch_size": task.prompts,
            "n_samples_per_prompt": task.samples,
            "dump_samples": 0,
        },
        "algorithm": {"advantage_estimator": "grpo", "loss_aggregation": "token_mean"},
        "train": {"max_tokens_per_gpu": 1 << 20},
        "optimizer": {"lr": task.learning_rate, "beta2": 0.999},
        "checkpoint": {"interval": 1 << 20},
        "tracking": ["miles_side:tracker"],
    }
    miles.train(config, reward=lambda sample: digits(sample.text))


tracker: TakesTurns

if __name__ == "__main__":
    sys.modules["miles_side"] = sys.modules["__main__"]
    given = json.loads(sys.argv[1])
    main(Path(given["folder"]), Task(**given["task"]), given["steps"], given["seed"])
