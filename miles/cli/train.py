"""`miles train`."""

from __future__ import annotations

from miles.cli import Call


def run(call: Call) -> int:
    """Train, or with `--dry-run` say what would be done."""
    if call.help:
        from miles.cli.flags import all_flags

        print(all_flags(call))
        return 0
    from miles.cli.resolving import resolve_call

    dry = call.take("--dry-run")
    resolved, plugins = resolve_call(call, "train", own=("--dry-run",))
    if dry:
        from miles.cli.describe import describe

        plugins.hook.miles_configure(config=resolved.config)
        print(describe(resolved, plugins))
        return 0
    from miles.jobs import run_training

    run_training(resolved)
    return 0
