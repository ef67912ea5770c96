"""The tests in peers/, run where verl, TRL and AReaL are installed beside miles."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".peers/algorithms/bin/python"
SECONDS = 300


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON.exists(), reason="bash scripts/peers/install.sh algorithms makes the venv of verl, trl, areal"
)
def test_verl_trl_and_areal_agree():
    command = [PYTHON, "-m", "pytest", "-m", "peers", "--tb=short", Path(__file__).with_name("peers")]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    summary = ran.stdout.strip().splitlines()[-1:]
    assert ran.returncode == 0, f"{ran.stdout[-5000:]}\n{ran.stderr[-2000:]}"
    assert "skipped" not in summary[0], (
        f"a peer is missing: bash scripts/peers/install.sh algorithms\n{ran.stdout[-2000:]}"
    )
