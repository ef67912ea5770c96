"""A job in miniature, and what two runs of it ended with, to the bit."""

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def sums_in(folder):
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps({"input": f"{i}+{i}=", "label": str(2 * i)}) + "\n" for i in range(24)))
    return path


def short(sample):
    """Rewards short answers that hold a digit: something that varies between samples."""
    return float(any(c.isdigit() for c in sample.text)) - 0.1 * sample.response_length


def job(checkpoint, sums, tmp_path):
    """Two steps of GRPO with two optimizer steps each."""
    return {
        "run": {"dir": str(tmp_path / "run"), "num_threads": 1, "deterministic": True},
        "model": {"hf_checkpoint": str(checkpoint)},
        "data": {"sets": [{"name": "default", "path": str(sums), "sampling": {"max_new_tokens": 6}, "reward": short}]},
        "rollout": {"num_rollout": 2, "batch_size": 4, "n_samples_per_prompt": 4},
        "algorithm": {"advantage_estimator": "grpo", "policy_loss": "ppo_clip"},
        "train": {"num_steps_per_rollout": 2},
        "optimizer": {"lr": 1e-3},
        "eval": {
            "sets": [
                {
                    "name": "heldout",
                    "path": f"{sums}@[0:8]",
                    "sampling": {"temperature": 0, "max_new_tokens": 6},
                    "reward": short,
                }
            ]
        },
    }


def metrics(run_dir):
    """Every step's metrics but for clock times and the check of a process's first weight sync."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "weight_sync/", "time"))} for line in lines]


def final_state(run_dir):
    """Of every model that learns: what is in its files."""
    found = {}
    for metadata in sorted(max((run_dir / "checkpoints").glob("step_*")).glob("*/.metadata")):
        model = metadata.parent.name
        dcp_to_torch_save(metadata.parent, run_dir / f"{model}.pt")
        found |= {f"{model}/{name}": tensor for name, tensor in torch.load(run_dir / f"{model}.pt").items()}
    return found


def assert_same_weights(one: Path, two: Path):
    first, second = final_state(one), final_state(two)
    assert first.keys() == second.keys()
    assert first, "no state was found"
    for name in first:
        if not torch.equal(first[name], second[name]):
            where = (first[name] != second[name]).nonzero()[0].tolist()
            raise AssertionError(f"first differing tensor: {name} at {where}")


def assert_same_end(one: Path, two: Path, but: tuple[str, ...] = ()):
    """`but`: beginnings of metrics that may differ."""
    assert_same_weights(one, two)
    for steps in zip(metrics(one), metrics(two), strict=True):
        before, after = ({k: v for k, v in step.items() if not k.startswith(but)} for step in steps)
        assert before == after
    rollouts = [sorted((run_dir / "rollouts").iterdir()) for run_dir in (one, two)]
    for before, after in zip(*rollouts, strict=True):
        assert before.read_text() == after.read_text(), before.name
