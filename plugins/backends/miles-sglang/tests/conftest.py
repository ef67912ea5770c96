"""Modules that the tests can import: `faults` (a proxy that spoils what passes through it), `served` (an engine behind
HTTP), `fake_server` (answers as SGLang does), `story` (an engine in front of that), and of scripts/ `soak` and
`canned_server`."""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[3] / "scripts"
MODULES = dict.fromkeys(("faults", "served", "fake_server", "story"), HERE)
for name, folder in {**MODULES, "soak": SCRIPTS, "canned_server": SCRIPTS / "gpu"}.items():
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


class Servers:
    """Those that stand for SGLang's, by what they wrote into a file when they were ready."""

    def __init__(self, file: Path):
        self.file = file

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in self.file.read_text().split()]

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """The one that was ready last."""
        os.kill(self.pids[-1], how)


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """The engine `sglang` starts servers of `stand_in.py`. It hands them weights in memory that any process can open by
    its name."""
    package = tmp_path / "path" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(HERE / "stand_in.py", package / "launch_server.py")
    (tmp_path / "pids").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN_PIDS", str(tmp_path / "pids"))
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield Servers(tmp_path / "pids")
    torch.multiprocessing.set_sharing_strategy(before)
