"""Scripts that need a GPU are run by people alone; that they fit the code they import is seen here."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
found = [importlib.import_module(path.stem) for path in sorted(folder.glob("*.py"))]
print(len(found))
"""


def test_scripts_for_a_gpu_import_here(root):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(root / "scripts" / "gpu")], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 10
