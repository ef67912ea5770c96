"""Executor `local`: processes of this machine, and what becomes of them."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from miles.api import ConfigError, ExecutorContext, Seats, WorkerError
from miles.builtins import local
from miles.builtins.local import LocalExecutor
from miles.testing import ExecutorContract
from miles.workers import group as groups
from miles.workers import process as processes
from miles.workers.serve import NOTE

PROJECT = '''
import asyncio, ctypes, logging, os, signal, subprocess, sys, threading, time, warnings

class Worker:
    def __init__(self, rank, size):
        self.rank, self.size, self.given_up = rank, size, False

    def pid(self):
        return os.getpid()

    def environment(self, *names):
        return [os.environ.get(name) for name in names]

    def talk(self):
        print("said by", self.rank)
        logging.getLogger("miles").info("informed")
        logging.getLogger("miles").warning("warned")
        warnings.warn("beware")

    def echo(self, value):
        return value

    def lock(self):
        return threading.Lock()

    def leave(self):
        sys.exit(3)

    def die(self):
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    def reduce_all_but(self, rank):
        import torch
        import torch.distributed as dist
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        if self.rank == rank:
            raise ZeroDivisionError("on purpose")
        dist.all_reduce(torch.zeros(1))

    def hang(self):
        """Rank 0 in C code that holds the lock of the interpreter, the others in a collective."""
        (self.rank == 0 and ctypes.PyDLL(None).sleep(100)) or self.reduce_all_but(None)

    def busy(self, seconds):
        time.sleep(seconds)

    def start_program(self):
        return subprocess.Popen(["sleep", "100"]).pid

    async def wait(self):
        try:
            await asyncio.sleep(100)
        finally:
            self.given_up = True

    def note(self):
        self.given_up = True

    async def stall(self):
        """Nothing else runs in the event loop."""
        time.sleep(100)

    def was_given_up(self):
        return self.given_up
'''


class TestLocal(ExecutorContract):
    name = "local"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a module that only `sys.path` leads to."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "local_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def launched(project, tmp_path):
    """`launched(use, workers=2)`: run `use(group)` with workers that log to a run directory."""

    def launch(use, workers=2):
        async def main():
            executor = LocalExecutor(context=ExecutorContext({"train": Seats(workers)}, run_dir=tmp_path))
            try:
                return await use(await executor.launch("train", "local_project:Worker"))
            finally:
                await executor.close()

        return asyncio.run(main())

    return launch


def gone(pids, seconds=20.0):
    """Whether all of them end in time; zombies of init have ended."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------------- day to day


def test_what_workers_say_is_logged_and_what_matters_is_repeated(launched, tmp_path, caplog):
    async def use(group):
        await group.call("talk")
        return await group.call("pid")

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train-0.log").write_text("of an earlier start\n")
    with caplog.at_level(logging.INFO, "miles"):
        pids = launched(use)
    logs = [(tmp_path / "logs" / f"train-{rank}.log").read_text() for rank in range(2)]
    logs[0] = logs[0].removeprefix("of an earlier start\n")
    for rank, log in enumerate(logs):
        first, *rest = log.splitlines()
        assert first.endswith(f"train rank {rank} of 2, pid {pids[rank]}")
        assert rest[0] == f"said by {rank}"
        assert "warned" in rest
    told = sorted((record.levelname, record.message) for record in caplog.records)
    warning = next(told.pop(n) for n, (_, text) in enumerate(told) if "beware" in text)
    assert told == [("INFO", "[train 0] informed"), ("WARNING", "[train 0] warned"), ("WARNING", "[train 1] warned")]
    assert warning[1].startswith("[train 0] ")


def test_what_cannot_cross_or_is_given_up_fails_alone(launched, monkeypatch):
    async def use(group):
        with pytest.raises(TypeError, match="pickle"):
            await group.call("echo", threading.Lock())
        with pytest.raises(WorkerError, match="cannot pickle '_thread.lock'"):
            await group.call("lock")
        monkeypatch.setattr(
            sys.modules["__main__"], "OfTheScript", type("OfTheScript", (), {"__module__": "__main__"}), raising=False
        )
        with pytest.raises(WorkerError, match="the script that was started is no module in a worker"):
            await group.call("echo", sys.modules["__main__"].OfTheScript())
        with pytest.raises(WorkerError, match="SystemExit: 3"):
            await group.call("leave")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.call_one(0, "wait"), 0.1)
        return await group.call("was_given_up")

    assert launched(use, workers=1) == [True], "the coroutine was not cancelled in the worker"


def test_a_plain_method_that_is_given_up_as_it_is_asked_for_is_done_all_the_same(launched):
    async def use(group):
        wire = group.links[0]._wire
        wire.post(1000, ("call", "0", "note", (), {}))
        wire.post(NOTE, 1000)
        return await group.call("was_given_up")

    assert launched(use, workers=1) == [True], "other ranks would wait for this one's part"


def test_each_worker_has_its_share_of_the_machine(monkeypatch):
    monkeypatch.setattr(local, "_cores", lambda: 13)
    monkeypatch.setattr(local, "_visible_gpus", lambda: ["3", "5", "7", "9", "11"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seats = {"train": Seats(2, gpus=1), "judge": Seats(1), "rollout": Seats(1, gpus=2)}
    executor = LocalExecutor(context=ExecutorContext(seats))
    environments = {
        (name, rank): executor._environment(name, rank, 77) for name in seats for rank in range(seats[name].workers)
    }
    seen = {seat: environment["CUDA_VISIBLE_DEVICES"] for seat, environment in environments.items()}
    assert seen == {("train", 0): "3", ("train", 1): "5", ("judge", 0): "", ("rollout", 0): "7,9"}
    assert {environment["OMP_NUM_THREADS"] for environment in environments.values()} == {"3"}
    one = environments["train", 1]
    assert [one[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        "1",
        "2",
        "1",
        "127.0.0.1",
        "77",
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert executor._environment("train", 0, 77)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(local, "_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert executor._environment("train", 0, 77)["OMP_NUM_THREADS"] == "1"


def test_ranks_meet_within_the_machine_unless_told_otherwise(launched, monkeypatch):
    names = "GLOO_SOCKET_IFNAME", "MASTER_ADDR"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.if_nameindex", lambda: [(2, "eth0"), (1, "lo")])
    assert launched(lambda group: group.call("environment", *names)) == [["lo", "127.0.0.1"]] * 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert launched(lambda group: group.call("environment", *names), workers=1) == [["eth0", "127.0.0.1"]]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "odd")])
    assert "GLOO_SOCKET_IFNAME" not in local._own_network()


def test_gpus_are_those_that_the_driver_sees(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert local._visible_gpus() == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local._visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("seats", "problem"),
    [
        (
            {"train": Seats(2, nodes=2)},
            "local is one machine, and train workers are asked for on 2; choose --executor ray",
        ),
        (
            {"train": Seats(2, gpus=1), "judge": Seats(1), "rollout": Seats(1, gpus=2)},
            r"local needs 2 for train \+ 2 for rollout = 4 GPUs, and this machine shows 3; ask for fewer",
        ),
    ],
)
def test_what_one_machine_cannot_do_is_refused(seats, problem, monkeypatch):
    monkeypatch.setattr(local, "_visible_gpus", lambda: ["0", "1", "2"])
    with pytest.raises(ConfigError, match=problem):
        LocalExecutor(context=ExecutorContext(seats))


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_worker_that_is_killed_leaves_its_last_words(launched):
    async def use(group):
        waiting = asyncio.ensure_future(group.call_one(1, "wait"))
        with pytest.raises(WorkerError) as caught:
            await group.call_one(1, "die")
        with pytest.raises(WorkerError, match="train rank 1 died in wait"):
            await waiting
        return caught.value, await group.call_one(0, "echo", "alive")

    error, answer = launched(use)
    lines = str(error).splitlines()
    assert lines[0] == "train rank 1 died in die:"
    assert lines[1].endswith("logs/train-1.log:")
    assert lines[-2:] == ["    last words", "killed by SIGKILL (out of memory?)"]
    assert answer == "alive"


def test_a_rank_that_fails_while_others_wait_for_it(launched, monkeypatch):
    monkeypatch.setattr(groups, "PATIENCE", 0.5)

    async def use(group):
        await group.call("reduce_all_but", None)
        pids = await group.call("pid")
        with pytest.raises(WorkerError) as caught:
            await group.call("reduce_all_but", 1)
        return pids, str(caught.value).splitlines()

    pids, lines = launched(use)
    assert lines[0] == "train rank 1 failed in reduce_all_but:"
    assert lines[-2] == "ZeroDivisionError: on purpose"
    assert lines[-1].startswith("then train rank 0: was waiting when it was ended, in all_reduce (")
    assert gone(pids)


def test_a_rank_that_stands_still_while_it_is_asked_alone(launched, monkeypatch):
    monkeypatch.setattr(groups, "PATIENCE", 0.5)

    async def use(group):
        pids = await group.call("pid")
        group.timeout = 0.3
        with pytest.raises(WorkerError) as caught:
            await asyncio.wait_for(group.call_one(1, "stall"), 20)
        return pids, str(caught.value).splitlines()

    pids, lines = launched(use)
    assert lines == [
        "train rank 1 does not answer in stall:",
        "nor does it say where it stands",
        "no answer in 0.3 s",
    ]
    assert gone(pids)


def test_closing_takes_no_longer_for_a_busy_worker_and_ends_what_it_started(launched, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.5)

    async def use(group):
        programs = await group.call("start_program")
        assert all(map(alive, programs))
        busy = asyncio.ensure_future(group.call("busy", 100))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await group.close()
        with pytest.raises(WorkerError, match="ended by the driver"):
            await busy
        return programs, time.monotonic() - began

    programs, seconds = launched(use, workers=1)
    assert seconds < 10
    assert gone(programs)


# ----------------------------------------------------------------------------------------------------- the driver's end

DRIVER = """
import asyncio, os, signal, sys
from miles.api import ExecutorContext, Seats
from miles.builtins.local import LocalExecutor

async def main():
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    executor = LocalExecutor(context=ExecutorContext({"train": Seats(2)}))
    group = await executor.launch("train", "local_project:Worker")
    pids = await group.call("pid")
    hanging = sys.argv[1:] and asyncio.ensure_future(group.call("hang"))
    await asyncio.sleep(0.2)
    print(*pids, flush=True)
    await asked.wait()
    print(*await group.call("echo", "saved"), flush=True)
    await executor.close()

asyncio.run(main())
"""
"""A script as people write them: nothing in it says that it may be imported, and the module lies beside it."""


@pytest.fixture
def driver(project):
    """`driver(*arguments)`: start the script, return the process and its workers' ids."""
    (project / "script.py").write_text(DRIVER)
    started = []

    def start(*arguments):
        command = [sys.executable, str(project / "script.py"), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process, [int(word) for word in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_workers_end_with_a_driver_that_is_killed_whatever_they_do(driver):
    process, pids = driver("hang")
    assert len(pids) == 2
    assert all(map(alive, pids))
    process.kill()
    assert gone(pids)


def test_after_ctrl_c_and_after_sigterm_workers_still_do_what_the_driver_wants(driver):
    process, pids = driver()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # as a scheduler does
    said, complaints = process.communicate(timeout=60)
    assert (said, complaints, process.returncode) == ("saved saved\n", "", 0)
    assert gone(pids)
