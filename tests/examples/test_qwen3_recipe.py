"""The recipe's own test: its path on a tiny stand-in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "qwen3-0.6b-grpo"


@pytest.mark.slow
def test_the_recipe_runs_on_its_stand_in():
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", RECIPE / "test.sh"], capture_output=True, text=True, timeout=300, env=here)
    assert done.returncode == 0, done.stderr
    assert "the recipe runs: 2 steps" in done.stdout
