"""`miles eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from miles.cli import Call
from miles.errors import ConfigError

HELP = """usage: miles eval [CONFIG.yaml ...] [--checkpoint PATH] [--json] [--flag value] [--section.key=value]

Measures a model on every set of eval.sets (--eval-prompt-data NAME PATH), with the evaluator of the configuration.
  --checkpoint PATH   a checkpoint of miles, a run directory, or a Hugging Face folder; model.hf_checkpoint otherwise
  --json              print the metrics as JSON
`miles train --help` lists the other flags."""


def run(call: Call) -> int:
    """Evaluate; say on stderr what, and print the metrics set by set."""
    if call.help:
        print(HELP)
        return 0
    from miles.cli.resolving import listed, resolve_call

    as_json = call.take("--json")
    named = call.take_value("--checkpoint")
    checkpoint = Path(named) if named else None
    if checkpoint is not None and not checkpoint.exists():
        raise ConfigError(f"--checkpoint {checkpoint}: there is no such file or folder")
    extra = []
    if checkpoint is not None and (checkpoint / "config.json").exists():
        extra, checkpoint = ["--hf-checkpoint", str(checkpoint)], None
    resolved, _ = resolve_call(call, "eval", extra, own=("--json", "--checkpoint"))
    from miles.jobs import run_evaluation

    print(f"miles: evaluating {_subject(resolved.config.model.hf_checkpoint, checkpoint)}", file=sys.stderr)
    results = run_evaluation(resolved, checkpoint)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        print("\n\n".join(listed(f"{name}:", metrics) for name, metrics in results.items()))
    return 0


def _subject(hf_checkpoint: str | None, checkpoint: Path | None) -> str:
    """Which weights are evaluated: of a checkpoint of miles, with its step, or those of `model.hf_checkpoint`."""
    if checkpoint is None:
        return f"{hf_checkpoint} (model.hf_checkpoint)"
    from miles.checkpoint import find_checkpoint

    found = find_checkpoint(checkpoint)
    return f"step {found.step}: {found.path} (a checkpoint of {hf_checkpoint})"
