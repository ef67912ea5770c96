"""`miles eval`."""

from __future__ import annotations

import json
from pathlib import Path

from miles.cli import Call
from miles.errors import ConfigError

HELP = """usage: miles eval [CONFIG.yaml ...] [--checkpoint PATH] [--json] [--flag value] [--section.key=value]

Measures a model on every set of eval.sets (--eval-prompt-data NAME PATH), with the evaluator of the configuration.
  --checkpoint PATH   a checkpoint of miles, a run directory, or a Hugging Face folder; model.hf_checkpoint otherwise
  --json              print the metrics as JSON
`miles train --help` lists the other flags."""


def run(call: Call) -> int:
    """Evaluate, and print one line a metric."""
    if call.help:
        print(HELP)
        return 0
    from miles.cli.resolving import resolve_call

    as_json = call.take("--json")
    named = call.take_value("--checkpoint")
    checkpoint = Path(named) if named else None
    if checkpoint is not None and not checkpoint.exists():
        raise ConfigError(f"--checkpoint {checkpoint}: there is no such file or folder")
    extra = []
    if checkpoint is not None and (checkpoint / "config.json").exists():
        extra, checkpoint = ["--hf-checkpoint", str(checkpoint)], None
    resolved, _ = resolve_call(call, "eval", extra)
    from miles.jobs import run_evaluation

    results = run_evaluation(resolved, checkpoint)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        for name, metrics in results.items():
            print("\n".join(f"{name}/{metric}: {value:.6g}" for metric, value in metrics.items()))
    return 0
