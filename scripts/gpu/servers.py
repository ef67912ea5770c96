"""HTTP servers that scripts measure against, each a process with a log of its own.

sglang    SGLang on the GPU
miles     `miles serve`: the torch engine behind the same API, on the CPU too
canned    `canned_server.py`: answers at once, so that only the client takes time
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout
from cases import end_group, safe_environment, tail
from miles_sglang.flags import words

HERE = "127.0.0.1"
OPTIONS = {
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_piecewise_cuda_graph": True,
    "log_level": "warning",
}
"""Beside what a script adds: what the machine of these measurements has."""
SGLANG = " ".join(words(OPTIONS))
THROUGH_MILES = SGLANG.replace("--", "--sglang-")
"""The same for servers that miles starts."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        return listener.getsockname()[1]


def command(kind: str, checkpoint: Path, port: int, flags: Sequence[str]) -> list[str]:
    if kind == "sglang":
        words = ["sglang.launch_server", "--model-path", str(checkpoint), "--host", HERE, *SGLANG.split()]
    elif kind == "miles":
        words = ["miles", "serve", str(checkpoint), "--host", HERE]
    else:
        words = ["canned_server"]
    return [sys.executable, "-m", *words, "--port", str(port), *flags]


@asynccontextmanager
async def serving(
    kind: str, checkpoint: Path, log: Path, flags: Sequence[str] = (), limit: float = 300.0
) -> AsyncIterator[str]:
    """The URL of a server, once it is healthy; it ends with the block.

    Raises:
        RuntimeError: it ended by itself, or did not become healthy, with the end of its log.
    """
    port, start = free_port(), time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command(kind, checkpoint, port, flags),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=safe_environment(),
            start_new_session=True,
        )
    url = f"http://{HERE}:{port}"
    try:
        async with ClientSession(timeout=ClientTimeout(total=10)) as session:
            while not await healthy(session, url):
                if process.poll() is not None or time.monotonic() - start > limit:
                    how = f"ended with status {process.returncode}" if process.poll() is not None else "is not healthy"
                    raise RuntimeError(f"server {kind} {how} after {time.monotonic() - start:.0f} s:\n{tail(log)}")
                await asyncio.sleep(0.25)
        print(f"server {kind} up in {time.monotonic() - start:.0f} s", flush=True)
        yield url
    finally:
        end_group(process)
        process.wait()


async def healthy(session: ClientSession, url: str) -> bool:
    with suppress(ClientError, TimeoutError):
        async with session.get(f"{url}/health") as answer:
            return answer.status == 200
    return False
