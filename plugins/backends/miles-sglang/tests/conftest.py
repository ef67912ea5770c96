"""Modules that the tests can import: `faults` (a proxy that spoils what passes through it), `served` (an engine behind
HTTP), `fake_server` (answers as SGLang does), `story` (an engine in front of that) and `soak` (scripts/soak.py)."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[3] / "scripts"
for name, folder in {**dict.fromkeys(("faults", "served", "fake_server", "story"), HERE), "soak": SCRIPTS}.items():
    found = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules[name])


@pytest.fixture
def stand_ins(tmp_path_factory, monkeypatch):
    """A folder with packages that stand for SGLang and its router, first on the path."""
    folder = tmp_path_factory.mktemp("stand_ins")
    shutil.copytree(HERE / "programs", folder, dirs_exist_ok=True)
    for package in folder.iterdir():
        (package / "__init__.py").touch()  # or one that is installed would come first
    monkeypatch.syspath_prepend(str(folder))
    return folder
