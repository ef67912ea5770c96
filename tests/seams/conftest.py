"""Ranks that are tested in processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS = 240
"""After which ranks are taken to hang."""


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(script, *arguments)`: a script beside this file, and all that it starts."""

    def run(script: str, *arguments: str) -> None:
        ranks = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said = ranks.communicate(timeout=SECONDS)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
        assert ranks.returncode == 0, said

    return run


@pytest.fixture(scope="module")
def communication(request, tmp_path_factory, run_ranks) -> Path:
    """What one, two and four ranks wrote of themselves, as the module's `WORK` says: see communication_rank.py."""
    folder = tmp_path_factory.mktemp("communication")
    run_ranks("communication_rank.py", str(folder), request.module.WORK)
    return folder
