"""A worker from the inside: the Ray actor around a `WorkerHost`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from miles_ray.parcel import Parcel
from miles_ray.versions import versions

if TYPE_CHECKING:  # torch comes after versions were compared: one that differs may not even be importable
    from miles.toolkit import WorkerHost

GLANCE = 1.0
"""Seconds between two looks at what there is to tell."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker takes over from the driver, where its machine has it."""

    path: Sequence[str]
    """Where modules are found."""
    directory: str
    """The one that relative paths start from."""
    log: Path | None = None
    mark: Path | None = None
    """Exists while workers start: who sees it sees the driver's log directory, too."""


@dataclass(frozen=True)
class Place:
    """Where a worker has come to live."""

    node: str
    pid: int
    versions: dict[str, str]
    log: Path | None
    shared_log: bool
    """Whether the driver reads the log where the worker writes it."""


@dataclass(frozen=True)
class News:
    """What a worker has to say without being asked."""

    messages: Sequence[tuple[int, str]] = ()
    """Of the logger of miles, with their levels."""
    output: bytes = b""
    """What was added to a log that the driver cannot see."""


class Actor:
    """One rank. Everything in it is called from the driver's `RayLink`."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._host: WorkerHost | None = None
        self._turn, self._turns = 0, asyncio.Condition()
        self._answers: dict[int, asyncio.Task] = {}
        self._abandoned: set[int] = set()
        self._messages: list[tuple[int, str]] = []
        self._log: Path | None = None
        self._told = 0

    async def enter(self, name: str, around: Surroundings) -> Place:
        """Take the driver's surroundings, send output to the log."""
        # Ray blocks what Ctrl-C sends, and in a cluster of the driver SIGTERM is blocked too: programs that are started
        # here could not be ended with either. No terminal sends them to this process: it leads a process group.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        sys.path[:0] = [entry for entry in around.path if entry not in sys.path]
        if Path(around.directory).is_dir():
            os.chdir(around.directory)
        shared, log = around.mark is not None and around.mark.exists(), around.log
        if log is not None:
            if not shared:
                descriptor, path = tempfile.mkstemp(prefix=f"miles-{name}-{self.rank}-", suffix=".log")
                os.close(descriptor)
                log = self._log = Path(path)
            _redirect_output(log)
            print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name} rank {self.rank} of {self.size}, pid {os.getpid()}")
        self._forward_logs(printed=log is not None)
        return Place(ray.util.get_node_ip_address(), os.getpid(), versions(), log, shared)

    async def request(self, turn: int, parcel: Parcel) -> Parcel:
        """A method of the host, and whether it succeeded: `(True, result)` or `(False, Failure)`.

        Requests begin in the order in which the driver made them. Ray hands them over in any, and ranks that begin
        their collectives in different orders wait for each other for ever.
        """
        method, args, fault = "", (), None
        try:
            method, *args = await parcel.open()
        except Exception as error:  # a module that is not here, or fails as it is imported
            fault = error
        async with self._turns:
            await self._turns.wait_for(lambda: self._turn == turn)
            answer = self._answers[turn] = asyncio.ensure_future(self._answer(method, args, fault))
            if turn in self._abandoned:
                self._abandoned.remove(turn)
                _give_up(answer)
            self._turn += 1
            self._turns.notify_all()
        try:
            return await answer
        finally:
            del self._answers[turn]

    async def abandon(self, turn: int) -> None:
        """Nobody waits for this answer any more."""
        if turn in self._answers:
            _give_up(self._answers[turn])
        elif turn >= self._turn:  # it has overtaken the request
            self._abandoned.add(turn)

    async def _answer(self, method: str, args: Sequence[Any], fault: Exception | None) -> Parcel:
        from miles.toolkit import WorkerHost, raised

        try:
            if fault is not None:
                raise fault
            if self._host is None:
                self._host = WorkerHost(self.rank, self.size)
            return Parcel.of((True, await getattr(self._host, method)(*args)))
        except BaseException as error:  # also SystemExit: no method of a worker may end the process
            return Parcel.of((False, raised(self.rank, error)))

    async def news(self, wait: bool = True) -> News:
        """What there is to tell; waits until there is something."""
        while True:
            output = _read(self._log, self._told)
            self._told += len(output)
            if self._messages or output or not wait:
                messages, self._messages[:] = list(self._messages), []
                return News(messages, output)
            await asyncio.sleep(GLANCE)

    def _forward_logs(self, printed: bool) -> None:
        """Have the driver repeat what is worth a person's attention: warnings, and of rank 0 everything."""
        logger = logging.getLogger("miles")
        collector = _Collector(self._messages, logging.WARNING if self.rank else logging.INFO)
        if printed:
            logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(collector)
        if self.rank == 0:
            logging.captureWarnings(True)
            logging.getLogger("py.warnings").addHandler(collector)


def _give_up(answer: asyncio.Task) -> None:
    """Cancel it after its first step, with which work for the thread that computes is in its place: other ranks do
    theirs."""
    asyncio.get_running_loop().call_soon(answer.cancel)


class _Collector(logging.Handler):
    """Keeps messages for the driver."""

    def __init__(self, messages: list[tuple[int, str]], level: int):
        super().__init__(level)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append((record.levelno, self.format(record)))


def _redirect_output(log: Path) -> None:
    """Of this process and of those that it starts, whoever writes it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _read(log: Path | None, offset: int) -> bytes:
    if log is None:
        return b""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read()


def rest_of(log: Path, offset: int) -> bytes:
    """The end of a worker's log, which is removed: run on its machine when the worker is gone."""
    rest = _read(log, offset)
    log.unlink()
    return rest
