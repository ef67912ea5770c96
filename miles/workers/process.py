"""The link to a worker that is a process of this machine (`miles.workers.serve`).

Driver and worker speak over a pair of sockets (`miles.workers.wire`). The process leads a group of its own: Ctrl-C in a
terminal does not reach it, and what it starts ends with it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from miles.log import logger
from miles.workers.failure import Failure, WorkerFailure
from miles.workers.serve import NOTE
from miles.workers.settling import when_idle
from miles.workers.wire import Load, Wire

PATIENCE = 5.0
"""Seconds that a worker has to end by itself; and again, once it is killed."""
LAST_LINES = 20
"""Of its log, shown when it has died."""


class ProcessLink:
    """The driver's end of one worker process."""

    def __init__(self, name: str, rank: int, process: subprocess.Popen, log: Path | None, log_start: int):
        self.name, self.rank, self.process = name, rank, process
        self._log, self._log_start = log, log_start
        self._wire = Wire(self._receive, self._lost)
        self._numbers = itertools.count(NOTE + 1)
        self._pending: dict[int, asyncio.Future] = {}
        self._calls = self._answers = 0
        self._speaking = False
        self._over = asyncio.Event()
        self._killed = False
        self._failure: Failure | None = None
        self._burial: asyncio.Future | None = None

    @classmethod
    async def start(
        cls, name: str, rank: int, size: int, environment: Mapping[str, str], log: Path | None
    ) -> ProcessLink:
        """Start a process; it answers as soon as it is up.

        Args:
            name: of its group, for messages.
            environment: its variables. Its modules come from where the driver's do.
            log: where it writes; None for the driver's standard error.
        """
        ours, theirs = socket.socketpair()
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(log or os.devnull, "ab") as file:
            output = file.fileno() if log else sys.__stderr__.fileno() if sys.__stderr__ else None
            words = (theirs.fileno(), name, rank, size, os.getpid(), int(log is not None))
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "miles.workers.serve", *map(str, words)],
                env={**environment, "PYTHONPATH": os.pathsep.join(_own_paths())},
                pass_fds=[theirs.fileno()], process_group=0,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            link = cls(name, rank, process, log, file.tell())
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: link._wire, sock=ours)
        return link

    async def request(self, method: str, *args: Any) -> Any:
        if self._failure:
            raise WorkerFailure(self._failure)
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._wire.post(number, (method, *args))
            self._calls += 1
            self._settle_soon()
            return await future
        except asyncio.CancelledError:
            self._wire.post(NOTE, number)
            raise
        finally:
            del self._pending[number]

    async def stop(self) -> None:
        self._wire.post(NOTE, None)
        try:
            await self._wait_for_end()
        finally:
            self.kill()
        if not await self._wait_for_end():
            logger.warning("process %d (%s rank %d) does not end", self.process.pid, self.name, self.rank)

    def kill(self) -> None:
        self._killed = self._killed or self._burial is None
        self._end_all()

    async def _wait_for_end(self) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), PATIENCE)
        return self._over.is_set()

    def _end_all(self) -> None:
        """The process, and what it has started."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # all of them are gone, or about to be
                os.killpg(self.process.pid, signal.SIGKILL)

    def _receive(self, number: int, load: Load) -> None:
        if number == NOTE:
            level, text = load()
            logger.log(level, "[%s %d] %s", self.name, self.rank, text)
            return
        self._answers += 1
        self._settle_soon()
        if (future := self._pending.get(number)) and not future.done():  # else it was given up
            try:
                answer = load()
            except Exception as error:
                answer = Failure(self.rank, "raised", f"the answer cannot be read: {type(error).__name__}: {error}")
            if isinstance(answer, Failure):
                future.set_exception(WorkerFailure(answer))
            else:
                future.set_result(answer)

    def _settle_soon(self) -> None:
        """Tell the worker when everything that follows from what was said has been said."""

        def tell() -> None:
            self._speaking = False
            if self._failure is None:
                self._wire.post(NOTE, (self._calls, self._answers))

        if not self._speaking:
            self._speaking = True
            loop = asyncio.get_running_loop()
            loop.call_soon(when_idle, loop, tell)

    def _lost(self) -> None:
        self._burial = asyncio.ensure_future(self._bury())

    async def _bury(self) -> None:
        """The process has closed its socket: wait for its end, and tell everybody who waits for an answer."""
        self._end_all()
        while self.process.poll() is None:
            await asyncio.sleep(0.01)
        self._failure = Failure(self.rank, "died", self._obituary(self.process.returncode))
        for future in self._pending.values():
            if not future.done():
                future.set_exception(WorkerFailure(self._failure))
        self._over.set()

    def _obituary(self, code: int) -> str:
        """How it ended, after the last it said."""
        how = "ended by the driver" if self._killed else f"exit code {code}" if code >= 0 else _signalled(-code)
        if not self._log:
            return how
        with self._log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - 16384))
            lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"last lines of {self._log}:", *(f"    {line}" for line in lines), how])


def _signalled(number: int) -> str:
    with suppress(ValueError):  # of no name
        name = signal.Signals(number).name
        return f"killed by {name}{' (out of memory?)' if number == signal.SIGKILL else ''}"
    return f"killed by signal {number}"


def _own_paths() -> list[str]:
    """Where modules come from besides this environment: the folder of the user's script, for one."""
    known = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return [path or os.getcwd() for path in sys.path if os.path.exists(path or ".") and not path.startswith(known)]
