"""`faults`, the proxy that spoils what passes through it, can be imported by every test here."""

import importlib.util
import sys
from pathlib import Path

_faults = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
sys.modules["faults"] = importlib.util.module_from_spec(_faults)
_faults.loader.exec_module(sys.modules["faults"])
