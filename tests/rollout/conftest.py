"""`playhouse` can be imported by every test here."""

import importlib.util
import sys
from pathlib import Path

_playhouse = importlib.util.spec_from_file_location("playhouse", Path(__file__).with_name("playhouse.py"))
sys.modules["playhouse"] = importlib.util.module_from_spec(_playhouse)
_playhouse.loader.exec_module(sys.modules["playhouse"])
