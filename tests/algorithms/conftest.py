"""`onestep` and `golden` can be imported by every test here and in peers/."""

import importlib.util
import sys
from pathlib import Path

for name in ("onestep", "golden"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
