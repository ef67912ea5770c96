"""`miles rollout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from miles.cli import Call
from miles.errors import RunInterrupted

HELP = """usage: miles rollout [CONFIG.yaml ...] --dump FOLDER [--flag value] [--section.key=value]

Generates, judges and filters the batches that a training run of this configuration would train on, without training:
all with the weights of model.hf_checkpoint (or, with --load, of a checkpoint of miles).
  --dump FOLDER       where they go: step_000001.npz and on. Half-finished, it is gone on with by the same command
  --num-rollout N     how many
`miles train CONFIG.yaml --replay FOLDER` trains on them. `miles train --help` lists the other flags."""

OVER_ALL = ("rollout/samples/", "rollout/generated_tokens", "perf/generate_time")
"""Metrics that add up; of others the mean over batches is told, or the last where they are about the whole run."""


def run(call: Call) -> int:
    """Generate; a line a batch goes to stderr, what they were like together to stdout."""
    if call.help:
        print(HELP)
        return 0
    from miles.cli.resolving import listed, resolve_call

    resolved, _ = resolve_call(call, "rollout")
    from miles.jobs import run_rollouts

    folder = resolved.config.rollout.dump
    try:
        found = run_rollouts(resolved)
    except RunInterrupted as stop:
        stop.add_note(f"every whole batch is in {folder}; the same command goes on")
        raise
    print(listed(f"{folder}: {len(found)} batch{'es' * (len(found) != 1)} more", _together(found)))
    return 0


def _together(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    together: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in found for name in metrics):
        values = [metrics[name] for metrics in found if name in metrics]
        together[name] = sum(values) / (1 if name.startswith(OVER_ALL) else len(values))
        if name.startswith("data/"):
            together[name] = values[-1]
    together.pop("perf/tokens_per_second", None)
    return together
