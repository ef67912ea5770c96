"""A program with all its children in a process group of their own, which ends with this process, however that ends."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from miles_sglang import guard

logger = logging.getLogger("miles")

GRACE = 3.0
"""Seconds from SIGTERM to SIGKILL: what a server would finish in more, nobody waits for any more."""
UNKILLABLE = 30.0
"""Seconds from SIGKILL until a process that a driver does not let go of is left to the system."""
TAIL = 20
"""Lines of its log that an error shows."""
TAIL_BYTES = 64 * 1024
LOOK = 0.05
"""Seconds between two looks at a process that is ending."""


class GuardedProcess:
    """Started once by `start`, and again after `stop` or its death."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        grace: float = GRACE,
    ):
        """`log` gets everything that it writes, after what is there already; `environment` is all of it, ours where not
        given."""
        self.name, self.command, self.log = name, list(command), log
        self.environment, self.grace = environment, grace
        self._group: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def start(self) -> None:
        """On return it runs, or has ended already: see `death`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"# {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(self.command)}\n".encode())
            log.flush()
            guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(self.grace), *self.command]
            self._group = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self._stopped = False

    def death(self) -> str:
        """How it ended, with the end of its log; empty while it runs."""
        if self._group is None:
            return f"{self.name} was not started"
        if not self._ended(self._group):
            return ""
        if self._stopped:
            return f"{self.name} was stopped"
        return f"{self.name} ended with {_said(self._group.returncode)}; {self.last_lines()}"

    def last_lines(self) -> str:
        """Of its log, and where that is."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()[-TAIL:]
        except OSError as error:
            return f"its log {self.log} cannot be read: {error.strerror}"
        return "\n".join([f"the last lines of {self.log}:", *(f"    {line}" for line in lines)])

    async def stop(self) -> None:
        """SIGTERM to the whole group, and SIGKILL to what is left of it when the program has ended, or does not."""
        if (group := self._group) is None or self._ended(group):
            return
        self._stopped = True
        _signal(group.pid, signal.SIGTERM)
        last = time.monotonic() + self.grace
        while not self._ended(group):
            if (late := time.monotonic() - last) > UNKILLABLE:
                logger.warning("%s (process %d) does not end; its log is %s", self.name, group.pid, self.log)
                return
            if late > 0:
                _signal(group.pid, signal.SIGKILL)
            await asyncio.sleep(LOOK)

    def _ended(self, group: subprocess.Popen[bytes]) -> bool:
        """Whether its first process has ended; then its children end, and it is forgotten by the system only after
        that, so that its number can be nobody else's."""
        if group.returncode is not None:
            return True
        with suppress(ChildProcessError):  # somebody in this process waits for every child: it is gone already
            if os.waitid(os.P_PID, group.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False
        _signal(group.pid, signal.SIGKILL)
        return group.poll() is not None


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _said(code: int) -> str:
    """An exit code, in words where a signal stands behind it: -9 of the process itself, 137 of one that it guards."""
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        return f"signal {signal.Signals(number).name}"
    return f"exit code {code}"
