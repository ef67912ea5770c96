"""One call: receive code, run it in a process behind a jail's layers, watch, kill, answer. Runs in the supervisor.

The program's end of the pipes is all that it has of us. What comes out of them is bytes: cut at a limit, decoded, and
sent on as text within JSON. Nothing that the program wrote is ever unpickled or evaluated.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

from miles_retool.sandbox import program
from miles_retool.sandbox.layers import Jail
from miles_retool.sandbox.limits import MIB

TICK = 0.05
"""Seconds between two looks at memory."""
HEADER = struct.Struct("!I")


def receive(connection: socket.socket) -> bytes | None:
    """A frame: its length, and so many bytes. None when the other side has left."""
    head = _exactly(connection, HEADER.size)
    return None if head is None else _exactly(connection, HEADER.unpack(head)[0])


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    pieces = []
    while size:
        piece = connection.recv(min(size, MIB))
        if not piece:
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def serve(connection: socket.socket, jail: Jail) -> None:
    """Answer one call with an object: `stdout`, `stderr`, `exit_code` (negative: a signal), `stopped` and `seconds`.

    `stopped` says which limit the supervisor enforced: `time`, `memory`, `output`, or nothing. `broken` in place of
    these is an error of the sandbox itself. A caller who leaves ends the call.
    """
    code = receive(connection)
    if code is None:
        return
    try:
        answer = Call(jail).run(code.decode("utf-8", "replace"), connection)
    except OSError as error:
        answer = {"broken": str(error)}
    if answer is not None:
        body = json.dumps(answer).encode()
        connection.sendall(HEADER.pack(len(body)) + body)


class Call:
    """A program while it runs."""

    def __init__(self, jail: Jail):
        self.jail, self.limits = jail, jail.limits
        self.said: dict[int, bytearray] = {}
        """Reading end of standard output and of standard error -> what came."""
        self.room = self.limits.output_kb * 1024

    def run(self, code: str, connection: socket.socket) -> dict | None:
        """The answer, or None when the caller has left."""
        started = time.monotonic()
        usual = self.jail.private_memory()
        self.jail.in_supervisor()
        process = self._start(code, connection)
        watched = os.pidfd_open(process)
        try:
            stopped = self._watch(watched, connection, started + self.limits.seconds, usual)
        finally:
            signal.pidfd_send_signal(watched, signal.SIGKILL)
            _, status, used = os.wait4(process, 0)  # with it, all of its pid namespace is gone
            seconds = time.monotonic() - started
            self.jail.sweep()
        for pipe in self.said:
            self._read(pipe)
        exit_code = os.waitstatus_to_exitcode(status)
        if not stopped and exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
            stopped = "time" if used.ru_utime + used.ru_stime >= self.limits.seconds else ""
        if stopped == "left":
            return None
        stdout, stderr = (bytes(said).decode("utf-8", "replace") for said in self.said.values())
        return {"stdout": stdout, "stderr": stderr, "exit_code": exit_code, "stopped": stopped, "seconds": seconds}

    def _start(self, code: str, connection: socket.socket) -> int:
        """The process id. Raises OSError when a layer cannot be put on."""
        trouble, complain = os.pipe()
        pipes = os.pipe(), os.pipe()
        process = os.fork()
        if process == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for number, (_, writing) in enumerate(pipes, 1):
                    os.dup2(writing, number)
                self.jail.in_program()
            except BaseException as error:
                os.write(complain, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
            program.run(code)
        os.close(complain)
        for reading, writing in pipes:
            os.close(writing)
            os.set_blocking(reading, False)
            self.said[reading] = bytearray()
        complaint = os.read(trouble, 1000)  # nothing, once the program has closed what it does not need
        os.close(trouble)
        if complaint:
            os.waitpid(process, 0)
            self.jail.sweep()
            raise OSError(complaint.decode("utf-8", "replace"))
        return process

    def _watch(self, process: int, connection: socket.socket, deadline: float, usual: int) -> str:
        """Wait for the program's end, which is `""`, or for a reason to end it."""
        poll = select.poll()
        for descriptor in (process, connection.fileno(), *self.said):
            poll.register(descriptor, select.POLLIN)
        look = time.monotonic() + TICK
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(max(min(look, deadline) - time.monotonic(), 0) * 1000)}
            if connection.fileno() in ready:
                return "left"
            for pipe in ready & self.said.keys():
                if not self._read(pipe):
                    poll.unregister(pipe)
            if self.room < 0:
                return "output"
            if process in ready:
                return ""
            now = time.monotonic()
            if now >= deadline:
                return "time"
            if now >= look:
                look = now + TICK
                if self._memory(usual) > self.limits.memory_mb * MIB:
                    return "memory"

    def _memory(self, usual: int) -> int:
        """Bytes of all its processes, beyond what each had when it began."""
        return sum(max(self.jail.private_memory(process) - usual, 0) for process in self.jail.descendants())

    def _read(self, pipe: int) -> bool:
        """Take what there is, up to the limit; whether there may be more."""
        while self.room >= 0:
            try:
                piece = os.read(pipe, 65536)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self.said[pipe] += piece[: self.room]
            self.room -= len(piece)
        return True


def supervise(connection: socket.socket, jail: Jail) -> None:
    """The life of a supervisor, from its fork to its end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        serve(connection, jail)
        status = 0
    except BrokenPipeError:
        status = 0  # the caller has left
    except BaseException as error:
        print(f"miles-retool: supervisor: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)
