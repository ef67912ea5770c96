"""The trainer's side of the sandbox: starts the zygote, sends it calls, starts another when it has died."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from miles.api import ConfigError, WorkerError
from miles_retool.sandbox.call import HEADER
from miles_retool.sandbox.layers import LAYERS, PROTECTS, protected, remove
from miles_retool.sandbox.limits import MIB, Limits
from miles_retool.sandbox.zygote import HELLO_BYTES

START_SECONDS = 60.0
GRACE_SECONDS = 30.0
"""How much longer than the program's own time an answer may take, on a machine that is busy."""
LONGEST_CODE = MIB
USUAL = Limits()
BOOT = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from miles_retool.sandbox.zygote import main; "
    "del sys.path[0]; main(int(sys.argv[2]), json.loads(sys.argv[3]))"
)
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""All that programs see of ours; HOME and TMPDIR are added. The same on every machine, so that a program prints the
same; libraries with threads of their own cannot be forked."""
logger = logging.getLogger("miles")


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    stdout: str = ""
    stderr: str = ""
    """With the traceback of an exception that it did not catch."""
    exit_code: int = 0
    """Negative: the signal that ended it."""
    stopped: str = ""
    """The limit that it was stopped for: `time`, `memory` or `output`; `lost` when it took its supervisor with it."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.stopped or self.exit_code)


class Sandbox:
    """Runs programs, each in a process of its own that has never run another.

    At most `concurrency` at the same time (in one event loop); others wait. Safe to use from several event loops, one
    after the other or in threads.
    """

    def __init__(
        self,
        limits: Limits = USUAL,
        *,
        packages: Sequence[str] = (),
        concurrency: int = 32,
        require: Sequence[str] = tuple(PROTECTS),
        layers: Sequence[str] = LAYERS,
    ):
        """Args:
        packages: modules beyond the standard library, imported ahead, with all that they import.
        require: what must be protected, of `PROTECTS`; `start` raises where it cannot be.
        layers: which may be used, of `LAYERS`.

        Raises:
            ConfigError: a limit, or a name, makes no sense.
        """
        faults = limits.faults() + [f"concurrency={concurrency} (at least 1)"] * (concurrency < 1)
        faults += [f"require: {name!r} (of {', '.join(PROTECTS)})" for name in require if name not in PROTECTS]
        faults += [f"layers: {name!r} (of {', '.join(LAYERS)})" for name in layers if name not in LAYERS]
        if faults:
            raise ConfigError(f"sandbox: {'; '.join(faults)}")
        self.limits, self.packages, self.concurrency = limits, tuple(packages), concurrency
        self.require, self.allowed = tuple(require), tuple(layers)
        self.layers: frozenset[str] = frozenset()
        """Those that are on. Known once it has started."""
        self.protected: frozenset[str] = frozenset()
        """What they protect, of `PROTECTS`."""
        self.missing: dict[str, str] = {}
        """Layer -> why it is not."""
        self.starts = 0
        self.running = 0
        self.most_running = 0
        """The most that ran at the same time."""
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._places = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None

    async def run(self, code: str) -> Result:
        """Run a program to its end.

        Raises:
            WorkerError: the sandbox cannot be started, or its layers cannot be put on.
        """
        loop = asyncio.get_running_loop()
        async with self._places.setdefault(loop, asyncio.Semaphore(self.concurrency)):
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                return await self._run(code.encode("utf-8", "replace"))
            finally:
                self.running -= 1

    async def _run(self, code: bytes) -> Result:
        if len(code) > LONGEST_CODE:
            return Result(stderr=f"the program has more than {LONGEST_CODE} bytes", exit_code=1)
        for _ in "12":
            zygote = self._living()
            if zygote is None:
                zygote = await asyncio.to_thread(self.start)
            try:
                answer = await self._ask(zygote, code)
            except (ConnectionError, TimeoutError):
                answer = None
            except OSError as error:
                if zygote.process.poll() is None:  # too many open files, for one: nothing that the program did
                    raise WorkerError(f"sandbox: no call can be made: {error}") from error
                answer = None  # its socket was closed by who starts another
            if answer is not None:
                break
            await asyncio.sleep(0.1)  # sockets of a process that dies are closed before its parent can see it
            if zygote.process.poll() is None:
                return Result(stopped="lost", exit_code=-9)  # it was this call's supervisor alone
            logger.warning("sandbox: its zygote has died (exit code %s); starting another", zygote.process.returncode)
        else:
            raise WorkerError("sandbox: its zygote died twice in one call")
        if "broken" in answer:
            raise WorkerError(f"sandbox: a layer could not be put on: {answer['broken']}")
        return Result(**answer)

    async def _ask(self, zygote: Zygote, code: bytes) -> dict | None:
        """The answer to one call; None when its supervisor died before it had one."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                while True:
                    try:
                        socket.send_fds(zygote.control, [b"."], [theirs.fileno()])
                        break
                    except BlockingIOError:  # many have called at once
                        await asyncio.sleep(0.001)
            try:
                async with asyncio.timeout(self.limits.seconds + GRACE_SECONDS):
                    await loop.sock_sendall(ours, HEADER.pack(len(code)) + code)
                    head = await _exactly(ours, HEADER.size)
                    body = head and await _exactly(ours, HEADER.unpack(head)[0])
            finally:
                ours.shutdown(socket.SHUT_RDWR)  # closing is not enough where a fork of the trainer holds it as well
        return json.loads(body) if body else None

    def start(self) -> Zygote:
        """Start the zygote, unless it runs. Blocks for some tenths of a second.

        Raises:
            WorkerError: it did not start, or this machine cannot protect what `require` names.
        """
        if sys.platform != "linux":
            raise WorkerError(
                f"sandbox: it is made of what Linux has, and this is {sys.platform}; use a container there"
            )
        with self._lock:
            if zygote := self._living():
                return zygote
            try:  # one that has died is forgotten; its folder goes with the last of its calls
                zygote = Zygote(asdict(self.limits), self.allowed, self.packages)
            except OSError as error:
                raise WorkerError(f"sandbox: its zygote did not start: {error}") from error
            self.layers, self.missing = frozenset(zygote.hello["layers"]), zygote.hello["missing"]
            self.protected = protected(self.layers, zygote.hello["as_root"])
            unprotected = [what for what in self.require if what not in self.protected]
            if unprotected:
                zygote.stop()
                why = "; ".join(f"{layer}: {reason}" for layer, reason in self.missing.items())
                raise WorkerError(
                    f"sandbox: {' and '.join(unprotected)} cannot be protected from programs on this machine. Layers "
                    f"that do not work: {why or 'none that may be used'}. Let the container make namespaces (docker: "
                    "--security-opt seccomp=unconfined), or name in `require` what you cannot do without"
                )
            self._zygote = zygote
            self.starts += 1
            if self.starts == 1:
                logger.info("sandbox: layers %s; protected: %s", *map(_listed, (self.layers, self.protected)))
            return zygote

    @property
    def zygote_id(self) -> int:
        """Process id; -1 before it has started."""
        return -1 if self._zygote is None else self._zygote.process.pid

    @property
    def base(self) -> str:
        """The folder that holds those of running calls, where there are no namespaces."""
        return "" if self._zygote is None else self._zygote.base

    def _living(self) -> Zygote | None:
        zygote = self._zygote  # another thread may close it in between
        return zygote if zygote is not None and zygote.process.poll() is None else None

    def close(self) -> None:
        """End the zygote. Calls that run are answered to their end."""
        if self._zygote is not None:
            self._zygote.stop()
            self._zygote = None


class Zygote:
    """The process, and the socket that it listens to. Ends with this object."""

    def __init__(self, limits: dict, layers: Sequence[str], packages: Sequence[str]):
        """Raises WorkerError when it does not start."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.base = base = tempfile.mkdtemp(prefix="miles-sandbox-")
        os.chmod(base, 0o711)  # programs under other user ids have folders in it
        paths = [path for path in map(os.path.realpath, sys.path) if os.path.isdir(path)] if packages else []
        settings = {"limits": limits, "layers": layers, "packages": packages, "paths": paths, "base": base}
        command = [sys.executable, "-I", "-S", "-c", BOOT, str(Path(__file__).parents[2])]
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self.stop = weakref.finalize(self, _stop, self.process, self.control, base)
        self.control.settimeout(START_SECONDS)
        try:
            said = self.control.recv(HELLO_BYTES)
        except TimeoutError:
            said = b""
        self.hello = json.loads(said or b'{"error": "it said nothing"}')
        if "error" in self.hello:
            self.stop()
            raise WorkerError(f"sandbox: its zygote did not start:\n{self.hello['error']}")
        self.control.setblocking(False)


async def _exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes; None when the other side has left before."""
    got, loop = bytearray(), asyncio.get_running_loop()
    while len(got) < size:
        piece = await loop.sock_recv(connection, size - len(got))
        if not piece:
            return None
        got += piece
    return bytes(got)


def _stop(process: subprocess.Popen, control: socket.socket, base: str) -> None:
    control.close()
    process.kill()
    process.wait()
    remove(base)


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


@cache
def shared_sandbox(limits: Limits, packages: tuple[str, ...], concurrency: int, require: tuple[str, ...]) -> Sandbox:
    """One sandbox for all environments of this process that ask for the same."""
    return Sandbox(limits, packages=packages, concurrency=concurrency, require=require)
