"""`miles config`."""

from __future__ import annotations

import json

from miles.cli import Call

HELP = """usage: miles config [CONFIG.yaml ...] [--json] [--changed] [--flag value] [--section.key=value]

Prints every value of the resolved configuration with where it came from: default, preset, file and line, flag.
  --changed   only what is not a default
  --json      {key: {"value": ..., "origin": ...}}
`miles train --help` lists the other flags."""


def run(call: Call) -> int:
    """Print each value with its origin."""
    if call.help:
        print(HELP)
        return 0
    from miles.cli.resolving import resolve_call
    from miles.cli.rows import values_of

    as_json, changed = call.take("--json"), call.take("--changed")
    resolved, _ = resolve_call(call, "show", own=("--json", "--changed"))
    rows = [row for row in values_of(resolved) if not changed or row.origin.kind != "default"]
    if as_json:
        table = {row.key: {"value": row.value, "origin": str(row.origin)} for row in rows}
        print(json.dumps(table, indent=2, default=str))
        return 0
    left = [f"{row.key} = {json.dumps(row.value, default=str)}" for row in rows]
    width = min(64, max(map(len, left), default=0))
    for text, row in zip(left, rows, strict=True):
        print(f"{text:<{width}}  # {row.origin}")
    return 0
