"""Processes that compare formulas for us, and that can be killed."""

from __future__ import annotations

import json
import queue
import selectors
import subprocess
import sys
import time
import weakref
from functools import cache
from typing import Any

from miles.api import WorkerError

START_SECONDS = 120.0
GRACE_SECONDS = 1.0
"""A worker that has not stopped by itself this long after its time is killed."""


class Worker:
    """One process that answers a line with a line."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "miles_math.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._stop = weakref.finalize(self, _stop, self._process)
        if self._read(START_SECONDS) is None:
            self.kill()
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode(errors="replace")
            raise WorkerError(f"reward math: its worker process did not start:\n{said[-2000:]}")

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer, or None when there is none in time or the process has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            return None
        return self._read(seconds)

    def _read(self, seconds: float) -> dict[str, Any] | None:
        out = self._process.stdout
        assert out is not None
        line, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                piece = out.read(65536)
                if not piece:
                    return None
                line += piece
        return json.loads(line)

    def kill(self) -> None:
        self._stop()


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


class WorkerPool:
    """At most `size` workers, started when needed, each serving one thread at a time."""

    def __init__(self, size: int):
        self._free: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(None)

    def compare(self, labels: list[str], answer: str, seconds: float) -> dict[str, Any] | None:
        """Whether `answer` equals one of `labels`: `{"correct": bool, "answered": bool}`, or None out of time."""
        worker = self._free.get()
        try:
            worker = worker or Worker()
            verdict = worker.ask({"labels": labels, "answer": answer, "seconds": seconds}, seconds + GRACE_SECONDS)
            if verdict is None:
                worker.kill()
                worker = None
        except BaseException:
            if worker is not None:
                worker.kill()
            worker = None
            raise
        finally:
            self._free.put(worker)
        return None if verdict is None or verdict.get("late") else verdict


@cache
def shared_pool(size: int) -> WorkerPool:
    """One pool for all rewards of this process that ask for this size."""
    return WorkerPool(size)
