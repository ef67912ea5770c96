"""Sandboxes in each combination of layers, as root and as an ordinary user, and what programs leave behind."""

import asyncio
import functools
import os
import shutil
import subprocess
import tempfile
import time

import psutil
import pytest
from miles_retool.sandbox import pool
from miles_retool.sandbox.layers import LAYERS
from miles_retool.sandbox.limits import Limits
from miles_retool.sandbox.pool import Sandbox

LIMITS = Limits(seconds=2, memory_mb=200, processes=12, file_mb=2, disk_mb=8, open_files=32, output_kb=32)
NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
COMBINATIONS = {
    "everything": (LAYERS, "root"),
    "namespaces": (("namespaces",), "root"),
    "without namespaces": (("user", "landlock", "seccomp"), "root"),
    "own user": (("user",), "root"),
    "ordinary user": (("namespaces", "landlock", "seccomp"), "nobody"),
    "ordinary user without namespaces": (("landlock", "seccomp"), "nobody"),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*protections): skipped on layers that do not protect these")


@pytest.fixture(scope="session", params=COMBINATIONS.values(), ids=list(COMBINATIONS))
def layered(request):
    """A running sandbox, or why there is none."""
    layers, user = request.param
    if os.geteuid() != 0 and "namespaces" not in layers:
        yield "without namespaces the kernel counts programs with all other processes of this user"
        return
    with pytest.MonkeyPatch.context() as patch:
        if user == "nobody" and os.geteuid() == 0:
            if not can_start_as_nobody():
                yield f"{SYSTEM_PYTHON} is not there for everybody, or older than 3.11"
                return
            as_nobody(patch)
        sandbox = Sandbox(LIMITS, layers=layers, require=())
        sandbox.start()
    missing = {layer: why for layer, why in sandbox.missing.items() if layer != "user" or os.geteuid() == 0}
    yield f"this machine lacks {missing}" if missing else sandbox
    sandbox.close()


def can_start_as_nobody():
    check = [SYSTEM_PYTHON, "-I", "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    folder = os.path.dirname(pool.__file__)
    return bool(
        shutil.which(SYSTEM_PYTHON)
        and subprocess.run(check, user=NOBODY).returncode == 0
        and subprocess.run(["test", "-r", pool.__file__, "-a", "-x", folder], user=NOBODY).returncode == 0
    )


def as_nobody(patch):
    """Zygotes start as on a machine where the trainer is an ordinary user."""

    def mkdtemp(**options):
        folder = tempfile.mkdtemp(**options)
        os.chown(folder, NOBODY, NOBODY)
        return folder

    started = functools.partial(subprocess.Popen, user=NOBODY, group=NOBODY, extra_groups=[])
    patch.setattr(pool.sys, "executable", SYSTEM_PYTHON)
    patch.setattr(pool, "tempfile", type("tempfile", (), {"mkdtemp": mkdtemp}))
    patch.setattr(pool, "subprocess", type("subprocess", (), {"Popen": started, "DEVNULL": subprocess.DEVNULL}))


@pytest.fixture
def ordinary_user(monkeypatch):
    """Sandboxes of this test are those of a trainer who is not root."""
    if os.geteuid() == 0:
        if not can_start_as_nobody():
            pytest.skip(f"{SYSTEM_PYTHON} is not there for everybody, or older than 3.11")
        as_nobody(monkeypatch)


@pytest.fixture
def sandbox(layered, request):
    """The same, on a machine that has its layers; afterwards it must work, and nothing may be left."""
    if isinstance(layered, str):
        pytest.skip(layered)
    for mark in request.node.iter_markers("needs"):
        if unprotected := set(mark.args) - layered.protected:
            pytest.skip(f"layers {', '.join(sorted(layered.layers))} do not protect {', '.join(sorted(unprotected))}")
    starts = layered.starts
    yield layered
    assert asyncio.run(layered.run("print('still here')")).stdout == "still here\n"
    assert layered.starts == starts, "the zygote was lost"
    until = time.monotonic() + 5
    while (left := processes_of(layered)[1:]) and time.monotonic() < until:
        time.sleep(0.01)  # a supervisor that has answered needs a moment to be gone
    assert left == []
    assert os.listdir(layered.base) == []


@pytest.fixture
def run(sandbox):
    """Run a program to its end."""
    return lambda code: asyncio.run(sandbox.run(code))


def processes_of(sandbox):
    """All processes that were forked from a sandbox's zygote, itself first, whoever they belong to now."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(sandbox.base in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return sorted(found, key=lambda process: process.pid != sandbox.zygote_id)


@pytest.fixture
def processes():
    return processes_of
