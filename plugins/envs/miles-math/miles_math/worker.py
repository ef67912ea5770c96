"""The process that compares: reads a JSON object a line, answers with one. `python -m miles_math.worker`.

It has its own time limit, for the usual case; one that it cannot keep is kept by whoever started it, with a kill.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 * 1024**3


class OutOfTime(BaseException):
    """Not an Exception: the library catches those and goes on."""


def compare(labels: list[str], answer: str) -> dict[str, bool]:
    """Whether the answer equals one of the labels. Anything that cannot be read or compared is not equal."""
    from math_verify import parse, verify

    try:
        said = parse(answer, parsing_timeout=None)
        for label in labels:
            gold = parse(rf"\boxed{{{label}}}", parsing_timeout=None)
            if gold and verify(gold, said, timeout_seconds=None):
                return {"correct": True, "answered": True}
    except Exception:
        return {"correct": False, "answered": False}
    return {"correct": False, "answered": bool(said)}


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import math_verify  # noqa: F401  (an error here goes to stderr, for whoever started us)

    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _out_of_time)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            verdict: dict[str, bool] = compare(request["labels"], request["answer"])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            verdict = {"late": True}
        print(json.dumps(verdict), file=answers)


if __name__ == "__main__":
    main()
