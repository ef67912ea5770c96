"""Runs a command, and ends it when the process that asked for it has died: `python guard.py PARENT GRACE COMMAND ...`.

A server holds a GPU, and its owner may be killed without a chance to stop it. The kernel's own answer,
PR_SET_PDEATHSIG, reaches one process and goes by the thread that started it, not by its process. So this program
stands in between, in the command's process group, and looks whether its parent is still the one it began with. Needs
nothing but the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

EVERY = 0.25
"""Seconds between two looks."""


def main(parent: int, grace: float, command: Sequence[str]) -> int:
    """The command's exit code, as a shell gives it: 128 and the signal for one that was killed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # sent to the whole group: the command decides what it does then
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # some parents ignore it, and exit codes are lost then
    running = subprocess.Popen(command)
    while os.getppid() == parent:
        try:
            code = running.wait(EVERY)
        except subprocess.TimeoutExpired:
            continue
        return code if code >= 0 else 128 - code
    os.killpg(0, signal.SIGTERM)
    try:
        running.wait(grace)
    except subprocess.TimeoutExpired:
        print(f"guard: it did not end within {grace:g} s of SIGTERM", flush=True)
    os.killpg(0, signal.SIGKILL)  # what is left of the group, this process with it
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
