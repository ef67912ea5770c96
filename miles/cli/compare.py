"""`miles compare`."""

from __future__ import annotations

from pathlib import Path

from miles.cli import Call
from miles.errors import ConfigError

HELP = """usage: miles compare RUN RUN2 [--tolerance 1e-5]

Says where two runs part: the first token that differs, the metrics that differ most, the weights (--save-hf hf).
Exits with 0 when they are the same to the tolerance, else with 1. Samples are compared as far as both runs have them in
rollouts/ (--dump-samples)."""
MOST = 5


def run(call: Call) -> int:
    """Compare and say what was found."""
    if call.help:
        print(HELP)
        return 0
    text = call.take_value("--tolerance") or "1e-5"
    if len(call.words) != 2 or any(word.startswith("-") for word in call.words):
        raise ConfigError(f"miles compare needs two run directories\n{HELP}")
    try:
        tolerance = float(text)
    except ValueError as error:
        raise ConfigError(f"--tolerance {text}: a number is expected, such as 1e-5") from error
    from miles.report.compare import compare, distance_of

    found = compare(*(Path(word) for word in call.words))
    print(f"{found.steps} steps and {found.tokens} tokens of samples compared")
    print(f"first differing token: {found.first_token or 'none'}")
    apart = sorted(found.metrics.items(), key=lambda item: -distance_of(*item[1][1:]))
    for name, (step, a, b) in apart[:MOST]:
        if away := distance_of(a, b):
            print(f"{name}: {a!r} and {b!r} at step {step}, {away:.2g} apart")
    if found.weights is not None:
        apart_at = f"at most {found.weights:.2g} apart ({found.weights_name})"
        print(f"weights: {apart_at if found.weights else 'the same to the bit'}")
    same = found.within(tolerance)
    print(f"{'the same' if same else 'different'}, to {tolerance:g}")
    return 0 if same else 1
