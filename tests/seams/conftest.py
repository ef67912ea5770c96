"""Ranks that are tested in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(script, [arguments of each process], seconds)`: all must end well before the seconds are over."""

    def run(script: str, arguments: list[list[str]], seconds: float) -> None:
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), *own],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for own in arguments
        ]
        deadline = time.monotonic() + seconds
        said = []
        try:
            for process in processes:
                said.append(process.communicate(timeout=max(deadline - time.monotonic(), 1))[0])
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)

    return run


@pytest.fixture(scope="session")
def communication(tmp_path_factory, run_ranks) -> Path:
    """What four ranks wrote of themselves: see communication_rank.py."""
    folder = tmp_path_factory.mktemp("communication")
    run_ranks("communication_rank.py", [[str(rank), str(folder)] for rank in range(4)], seconds=400)
    return folder
