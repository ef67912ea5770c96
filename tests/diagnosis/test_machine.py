"""Cores, memory, disks and limits, on machines made up for it."""

import os
import resource
import shutil
import time
from collections import namedtuple

import pytest

from miles.diagnosis import machine, surroundings

Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group with these files."""

    def group(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)
        monkeypatch.setattr(machine, "CGROUP", tmp_path)

    return group


def test_more_threads_than_a_container_has_cores(group, monkeypatch):
    group(cpu_max="150000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (found,) = machine.cores()
    assert found.facts["quota"] == 1.5
    assert (found.mark, found.facts["threads"]) == ("warn", 16)
    assert found.remedy == "--num-threads 1, or export OMP_NUM_THREADS=1"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [f.mark for f in machine.cores()] == ["ok"]


def test_no_limit_is_no_quota(group):
    group(cpu_max="max 100000\n")
    assert machine.cpu_quota() is None


def test_a_machine_that_is_busy_with_other_programs(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.1, 9.0, 9.0))
    (found,) = machine.load()
    assert (found.mark, found.found) == ("warn", "2.1 on 4 cores in the last minute: other programs are at work")
    assert "timings mean nothing" in found.remedy
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9, 9.0, 9.0))
    assert [f.mark for f in machine.load()] == ["ok"]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the doctor itself is work enough for one core
    monkeypatch.setattr(os, "getloadavg", lambda: (0.9, 0.0, 0.0))
    assert [f.mark for f in machine.load()] == ["ok"]
    monkeypatch.delattr(os, "getloadavg")
    assert list(machine.load()) == []


def test_memory_under_a_limit(group, monkeypatch):
    monkeypatch.setattr(machine, "_meminfo", lambda: (30 * GIB, 32 * GIB))
    group(memory_max=f"{4 * GIB}\n", memory_current=f"{3 * GIB}\n")
    (found,) = machine.memory()
    assert found.facts == {"free_bytes": GIB, "total_bytes": 4 * GIB}
    assert found.mark == "warn"
    group(memory_max="max\n")
    (found,) = machine.memory()
    assert (found.mark, found.facts["free_bytes"]) == ("ok", 30 * GIB)


def test_a_full_disk_stops_training_where_runs_are_written(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB, 1 << 20))
    here, temporary, *_ = machine.folders()
    assert (here.mark, here.stops) == ("fault", ("training",))
    assert here.found.endswith("full")
    assert (temporary.mark, temporary.stops) == ("fault", ())


def test_a_folder_that_cannot_be_written(monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    here = next(iter(machine.folders()))
    assert "cannot be written: Read-only file system" in here.found
    assert here.stops == ("training",)


def test_little_room_and_network_file_systems_are_warned_of(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 97 * GIB, 3 * GIB))
    assert "--keep-checkpoints 1" in next(iter(machine.folders())).remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, 100 * GIB))
    monkeypatch.setattr(machine, "file_system", lambda path: "nfs4")
    assert "a network file system" in next(iter(machine.folders())).found


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path):
    assert machine.file_system(tmp_path)
    assert machine.file_system(machine.Path("/proc/self")) == "proc"


def test_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 2048))
    (found,) = machine.limits()
    assert (found.mark, found.remedy) == ("warn", "ulimit -n 2048")


def test_an_encoding_that_is_not_utf8(monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    (found,) = machine.encoding()
    assert (found.mark, found.facts["files"]) == ("warn", "ANSI_X3.4-1968")


def test_a_clock_that_is_wrong(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert [f.mark for f in machine.clock()] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    (found,) = machine.clock()
    assert found.found == "-100 seconds between file system and machine"


# ------------------------------------------------------------------------------------------------- hub and environment


@pytest.fixture
def bare(monkeypatch, tmp_path):
    for name in [*surroundings.VARIABLES, *(n for n in os.environ if n.startswith("HF_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_only_variables_that_are_set_are_shown(bare, monkeypatch):
    assert list(surroundings.environment()) == []
    monkeypatch.setenv("LD_PRELOAD", "x" * 100)
    (found,) = surroundings.environment()
    assert found.found.startswith("x" * 57 + "...   (")
    assert found.facts == {"value": "x" * 100}


def test_the_hub_is_not_asked_unless_wanted(bare, monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("connected"))
    cache, access = surroundings.hub(online=False)
    assert f"{tmp_path}/hf/hub (not there yet)" in cache.found
    assert access.facts == {"offline": False, "token": False}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    access = list(surroundings.hub(online=False))[1]
    assert access.facts == {"offline": True, "token": True}
    assert "hf_secret" not in str(access)


def test_a_hub_that_answers_and_one_that_does_not(bare, monkeypatch):
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to everything
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert list(surroundings.hub(online=True))[-1].found.endswith("answers (501)")
    thread.join()
    server.server_close()
    found = list(surroundings.hub(online=True))[-1]
    assert (found.mark, found.facts) == ("warn", {"reached": False})
    assert "refused" in found.found
