"""A worker process of executor `local`: `python -m miles.workers.serve FD NAME RANK SIZE DRIVER LOGGED`.

The main thread answers the driver over the socket `FD`. When the driver goes away, however it died, this process ends
at once, even while its computing thread hangs in a collective. Signals are the driver's business: after a Ctrl-C or a
SIGTERM that reached everybody it still wants to save a checkpoint through its workers.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.workers.wire import Load, Wire

PR_SET_PDEATHSIG = 1
NOTE = 0
"""Number of messages that are no answers."""


def main() -> None:
    descriptor, name, rank, size, driver, logged = sys.argv[1:]
    _depend_on(int(driver))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    faulthandler.enable()
    if logged == "1":
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name} rank {rank} of {size}, pid {os.getpid()}", flush=True)
    import asyncio
    import socket

    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    connection.setblocking(False)
    asyncio.run(_serve(connection, int(rank), int(size), logged == "1"))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads of libraries, some of which abort a process that ends


def _depend_on(driver: int) -> None:
    """Have the kernel kill this process when the driver dies, whatever any thread is doing. It counts the thread that
    started this process as the driver; miles starts workers in the thread that lives as long as the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it died before
        os._exit(1)


def _ignore(number: int, frame: Any) -> None:
    """Not SIG_IGN, which programs that are started from here would inherit."""


async def _serve(connection: Any, rank: int, size: int, logged: bool) -> None:
    """Answer until the driver says that it is over."""
    import asyncio

    from miles.workers.failure import raised
    from miles.workers.host import WorkerHost
    from miles.workers.settling import with_driver
    from miles.workers.wire import Wire

    host, calls = WorkerHost(rank, size), dict[int, asyncio.Task]()

    def receive(number: int, load: Load) -> None:
        if number != NOTE:
            with_driver.called()
            calls[number] = asyncio.ensure_future(answer(number, load))
        elif (note := load()) is None:
            over.set()
        elif isinstance(note, tuple):
            with_driver.heard(*note)
        elif note in calls:  # it was given up: after its first step, as the other ranks do their plain methods
            asyncio.get_running_loop().call_soon(calls[note].cancel)

    async def answer(number: int, load: Load) -> None:
        try:
            method, *args = _loaded(load)
            wire.post(number, await getattr(host, method)(*args))
        except BaseException as error:  # also SystemExit: no method of a worker may end the process
            wire.post(number, raised(rank, error))
        finally:
            with_driver.answered()
            del calls[number]

    over = asyncio.Event()
    wire = Wire(receive, lost=lambda: os._exit(1))
    await asyncio.get_running_loop().create_connection(lambda: wire, sock=connection)
    _forward_logs(wire, rank, logged)
    await over.wait()
    await asyncio.gather(*calls.values(), return_exceptions=True)
    await host.drop("")  # what was called and given up


def _loaded(load: Load) -> Any:
    try:
        return load()
    except AttributeError as error:
        error.add_note(
            "the script that was started is no module in a worker: put what a worker shall find into another"
        )
        raise


def _forward_logs(wire: Wire, rank: int, logged: bool) -> None:
    """Have the driver repeat what is worth a person's attention: warnings, and of rank 0 everything."""
    import asyncio
    import logging
    from contextlib import suppress

    from miles.log import logger, speak

    loop = asyncio.get_running_loop()

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the process is about to
                loop.call_soon_threadsafe(wire.post, NOTE, (record.levelno, self.format(record).rstrip()))

    handler = Forward(logging.INFO if rank == 0 else logging.WARNING)
    if logged:
        speak()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    if rank == 0:
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(handler)


if __name__ == "__main__":
    main()
