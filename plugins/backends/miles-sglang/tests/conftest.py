"""`faults`, the proxy that spoils what passes through it, can be imported by every test here."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

_faults = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
sys.modules["faults"] = importlib.util.module_from_spec(_faults)
_faults.loader.exec_module(sys.modules["faults"])


@pytest.fixture
def stand_ins(tmp_path_factory, monkeypatch):
    """A folder with packages that stand for SGLang and its router, first on the path."""
    folder = tmp_path_factory.mktemp("stand_ins")
    shutil.copytree(Path(__file__).with_name("programs"), folder, dirs_exist_ok=True)
    for package in folder.iterdir():
        (package / "__init__.py").touch()  # or one that is installed would come first
    monkeypatch.syspath_prepend(str(folder))
    return folder
