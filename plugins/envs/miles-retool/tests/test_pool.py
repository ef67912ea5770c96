"""The pool: what dies is replaced, who leaves is forgotten, and no more run at once than may."""

import asyncio
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from miles_retool.sandbox import landlock, pool
from miles_retool.sandbox.layers import OWN_USERS, Jail, protected, remove
from miles_retool.sandbox.limits import Limits
from miles_retool.sandbox.pool import Result, Sandbox, shared_sandbox

from miles.api import ConfigError, WorkerError

LIMITS = Limits(seconds=10, memory_mb=200, processes=12)


@pytest.fixture
def sandbox():
    """As strong as this machine has it: these tests run no hostile code."""
    sandbox = Sandbox(LIMITS, require=(), concurrency=4)
    sandbox.start()
    if os.geteuid() != 0 and "namespaces" not in sandbox.layers:
        pytest.skip("without namespaces the kernel counts programs with all other processes of this user")
    yield sandbox
    sandbox.close()


def wait_until(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_a_program(sandbox):
    result = asyncio.run(sandbox.run("print('ü'); raise SystemExit(3)"))
    assert (result.stdout, result.stderr, result.exit_code, result.stopped) == ("ü\n", "", 3, "")
    assert 0 < result.seconds < 10


def test_a_traceback_shows_the_program_alone(sandbox):
    result = asyncio.run(sandbox.run("def half(x):\n    return x / 0\n\nhalf(1)"))
    assert [line for line in result.stderr.splitlines() if "~" not in line and "^" not in line] == [
        "Traceback (most recent call last):",
        '  File "<code>", line 4, in <module>',
        "    half(1)",
        '  File "<code>", line 2, in half',
        "    return x / 0",
        "ZeroDivisionError: division by zero",
    ]


def test_the_standard_library_is_there_and_a_program_is_main(sandbox):
    code = (
        "import sqlite3, zoneinfo, html.parser, concurrent.futures as futures, dataclasses, asyncio\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n"
        "async def f():\n    return A(1)\n"
        "if __name__ == '__main__':\n    print(asyncio.run(f()))\n"
        "    with futures.ThreadPoolExecutor(2) as pool: print(sum(pool.map(abs, [-1, 2])))"
    )
    result = asyncio.run(sandbox.run(code))
    assert result.stdout == "A(x=1)\n3\n", result.stderr


@pytest.mark.parametrize(
    ("code", "stdout", "exit_code"),
    [
        ("import sys; print(sys.argv)", "['-c']\n", 0),
        ("import argparse; print(argparse.ArgumentParser().parse_args())", "Namespace()\n", 0),
        ("print(1); exit()", "1\n", 0),
        ("quit(3)", "", 3),
        ("import sys; print(1, file=sys.__stdout__)", "1\n", 0),
        ("import io, sys; print(1, end=''); sys.stdout = io.StringIO(); print(2)", "1", 0),
        ("import sys; sys.stdout.close(); sys.stderr = None", "", 0),
        ("import time; print(time.tzname)", "('UTC', 'UTC')\n", 0),
    ],
)
def test_a_program_is_run_as_python_runs_it(sandbox, code, stdout, exit_code):
    result = asyncio.run(sandbox.run(code))
    assert (result.stdout, result.stderr, result.exit_code) == (stdout, "", exit_code)


def test_processes_of_its_own(sandbox):
    if "namespaces" not in sandbox.layers:
        pytest.skip("locks of multiprocessing need /dev/shm, which programs have with namespaces only")
    code = (
        "import multiprocessing as m\nqueue = m.get_context('fork').SimpleQueue()\n"
        "p = m.get_context('fork').Process(target=queue.put, args=(7,)); p.start(); print(queue.get()); p.join()"
    )
    assert asyncio.run(sandbox.run(code)).stdout == "7\n"


def test_a_zygote_that_has_died_is_replaced(sandbox):
    os.kill(sandbox.zygote_id, signal.SIGKILL)
    assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"
    assert sandbox.starts == 2


def test_calls_outlive_their_zygote(sandbox):
    async def main():
        call = asyncio.create_task(sandbox.run("import time; time.sleep(0.5); print(1)"))
        await asyncio.sleep(0.3)
        os.kill(sandbox.zygote_id, signal.SIGKILL)
        others = await asyncio.gather(*(sandbox.run("print(2)") for _ in range(6)))
        return await call, others

    result, others = asyncio.run(main())
    assert result.stdout == "1\n"
    assert [other.stdout for other in others] == ["2\n"] * 6
    assert sandbox.starts == 2


def test_files_of_calls_outlive_their_zygote():
    """Its folder goes with the last of its calls."""
    if os.geteuid() != 0:
        pytest.skip("without namespaces the kernel counts programs with all other processes of this user")
    sandbox = Sandbox(LIMITS, layers=("user", "seccomp"), require=())
    sandbox.start()
    base = sandbox.base

    async def main():
        code = "import time; time.sleep(1); open('f', 'w').write('kept'); print(open('f').read())"
        call = asyncio.create_task(sandbox.run(code))
        await asyncio.sleep(0.3)
        os.kill(sandbox.zygote_id, signal.SIGKILL)
        await sandbox.run("print(2)")
        return await call

    assert asyncio.run(main()).stdout == "kept\n"
    assert sandbox.starts == 2
    gc.collect()
    assert not os.path.exists(base)
    sandbox.close()


def test_a_zygote_that_dies_at_once_is_an_error(sandbox, monkeypatch):
    async def dies(zygote, code):
        zygote.process.kill()
        zygote.process.wait()

    monkeypatch.setattr(sandbox, "_ask", dies)
    with pytest.raises(WorkerError, match="died twice"):
        asyncio.run(sandbox.run("print(1)"))


def test_a_supervisor_that_is_killed_is_a_result_and_takes_its_program_along(sandbox, processes):
    async def main():
        call = asyncio.create_task(sandbox.run("import time; time.sleep(100)"))
        await asyncio.sleep(0.3)
        supervisor, *_ = psutil.Process(sandbox.zygote_id).children()
        supervisor.kill()
        return await call

    result = asyncio.run(main())
    assert (result.stopped, result.failed) == ("lost", True)
    wait_until(lambda: len(processes(sandbox)) == 1)
    assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"
    assert sandbox.starts == 1


def test_a_call_that_is_cancelled_ends_its_program(sandbox, processes):
    async def main():
        call = asyncio.create_task(sandbox.run("import time; time.sleep(100)"))
        await asyncio.sleep(0.3)
        assert len(processes(sandbox)) > 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    wait_until(lambda: len(processes(sandbox)) == 1)
    assert sandbox.running == 0


def test_a_call_that_is_cancelled_ends_its_program_though_a_fork_of_the_trainer_holds_its_socket(
    sandbox, processes, monkeypatch
):
    pairs, socketpair = [], pool.socket.socketpair
    monkeypatch.setattr(pool.socket, "socketpair", lambda: pairs.extend(pair := socketpair()) or pair)

    async def main():
        call = asyncio.create_task(sandbox.run("import time; time.sleep(100)"))
        await asyncio.sleep(0.3)
        held = [os.dup(end.fileno()) for end in pairs if end.fileno() >= 0]
        assert held
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return held

    held = asyncio.run(main())
    wait_until(lambda: len(processes(sandbox)) == 1)
    for descriptor in held:
        os.close(descriptor)


def test_what_the_trainer_lacks_is_no_result(sandbox, monkeypatch):
    def none_left(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(pool.socket, "send_fds", none_left)
    with pytest.raises(WorkerError, match="Too many open files"):
        asyncio.run(sandbox.run("print(1)"))
    monkeypatch.setattr(pool, "Zygote", none_left)
    with pytest.raises(WorkerError, match="did not start: .*Too many open files"):
        Sandbox(LIMITS).start()


def test_a_zygote_that_another_thread_closes_is_replaced(sandbox, monkeypatch):
    """Between the look whether it lives and the call."""
    zygote = sandbox._zygote
    ask = sandbox._ask

    async def late(zygote, code):
        if sandbox.starts == 1:
            sandbox.close()
        return await ask(zygote, code)

    monkeypatch.setattr(sandbox, "_ask", late)
    assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"
    assert zygote.process.poll() is not None


def test_other_systems_are_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(WorkerError, match="Linux"):
        Sandbox(LIMITS).start()


TRAINER = """
import asyncio, sys
from miles_retool.sandbox.pool import Limits, Sandbox

async def main():
    sandbox = Sandbox(Limits(seconds=100), require=())
    sandbox.start()
    call = asyncio.create_task(sandbox.run("import os\\nos.fork()\\nimport time; time.sleep(100)"))
    await asyncio.sleep(0.5)
    print(sandbox.base, flush=True)
    await call

asyncio.run(main())
"""


def test_nothing_outlives_a_trainer_that_was_killed():
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", TRAINER]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as trainer:
        base = trainer.stdout.readline().strip()
        assert len(mentioning(base)) >= 3
        trainer.kill()
    wait_until(lambda: mentioning(base) == [])
    remove(base)  # an empty folder is all that it left


def mentioning(word):
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(word in piece for piece in p.info["cmdline"] or [])]


def test_no_more_at_once_than_may(sandbox):
    """By what the sandbox counts, and by what programs see of each other's time."""

    async def main():
        code = "import time; print(time.monotonic()); time.sleep(0.2); print(time.monotonic())"
        return await asyncio.gather(*(sandbox.run(code) for _ in range(12)))

    spans = [tuple(map(float, result.stdout.split())) for result in asyncio.run(main())]
    assert sandbox.most_running == 4
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) <= 4


def test_more_calls_than_a_socket_takes(monkeypatch):
    """The queue of the zygote's socket is full; callers wait."""
    sandbox = Sandbox(LIMITS, require=(), concurrency=600)
    sandbox.start()
    sandbox._zygote.control.setsockopt(pool.socket.SOL_SOCKET, pool.socket.SO_SNDBUF, 1)

    async def main():
        return await asyncio.gather(*(sandbox.run(f"print({i})") for i in range(60)))

    assert [result.stdout for result in asyncio.run(main())] == [f"{i}\n" for i in range(60)]
    sandbox.close()


def test_several_event_loops(sandbox):
    results = {}

    def work(i):
        results[i] = [asyncio.run(sandbox.run(f"print({i})")).stdout for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [f"{i}\n"] * 3 for i in range(3)}


def test_packages_are_there_with_what_they_import_and_nothing_else():
    sandbox = Sandbox(Limits(seconds=30), packages=("numpy", "mpmath"), require=())
    code = "import numpy as np, mpmath; print(np.linalg.norm(np.array([3.0, 4.0])), mpmath.mpf(1) / 4)"
    assert asyncio.run(sandbox.run(code)).stdout == "5.0 0.25\n"
    if "files" in sandbox.protected:
        for name in ("torch", "miles", "miles_retool.sandbox.pool"):
            assert "Error" in asyncio.run(sandbox.run(f"import {name}")).stderr, name
    sandbox.close()


def test_a_package_of_one_file(tmp_path, monkeypatch):
    (tmp_path / "lonely.py").write_text("x = 7")
    (tmp_path / "other.py").write_text("x = 8")
    monkeypatch.syspath_prepend(tmp_path)
    sandbox = Sandbox(LIMITS, packages=("lonely",), require=())
    assert asyncio.run(sandbox.run("import lonely; print(lonely.x)")).stdout == "7\n"
    if "files" in sandbox.protected:
        assert "Error" in asyncio.run(sandbox.run("import other")).stderr
    sandbox.close()


def test_a_package_in_an_environment_in_a_projects_folder(tmp_path, monkeypatch):
    """All three are on the path of `python train.py`; programs see the package alone."""
    packages = tmp_path / "venv" / "lib" / "packages"
    (packages / "lonely").mkdir(parents=True)
    (packages / "lonely" / "__init__.py").write_text("x = 7")
    (packages / "other.py").write_text("x = 8")
    (tmp_path / "venv" / "token").write_text("secret")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.syspath_prepend(tmp_path)
    sandbox = Sandbox(LIMITS, packages=("lonely",), require=())
    assert asyncio.run(sandbox.run("import lonely; print(lonely.x)")).stdout == "7\n"
    if "files" in sandbox.protected:
        for code in ("import other", f"open({str(tmp_path / 'venv' / 'token')!r})"):
            assert "Error" in asyncio.run(sandbox.run(code)).stderr
    sandbox.close()


def test_a_package_with_a_thread_of_its_own(ordinary_user, monkeypatch):
    """An ordinary user's trainer makes user namespaces, which a process with threads may not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "threaded.py").write_text(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\nx = 7"
        )
        monkeypatch.syspath_prepend(folder)
        sandbox = Sandbox(LIMITS, packages=("threaded",), require=())
        assert asyncio.run(sandbox.run("import threaded; print(threaded.x)")).stdout == "7\n"
        base = sandbox.base
        sandbox.close()
        wait_until(lambda: mentioning(base) == [])


def test_a_package_that_is_not_installed():
    with pytest.raises(WorkerError, match="No module named 'no_such_thing'"):
        Sandbox(LIMITS, packages=("no_such_thing",), require=()).start()


CONTAINER = """
import asyncio, json
from miles_retool.sandbox import kernel, seccomp
from miles_retool.sandbox.pool import Sandbox

kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
del seccomp.BY_ARGUMENT[seccomp.PRCTL]  # which Docker lets through
seccomp.install(alone=True)
sandbox = Sandbox()
said = asyncio.run(sandbox.run("import os; print(os.getuid())")).stdout
print(json.dumps([sorted(sandbox.layers), sandbox.missing, said]))
"""


def test_in_a_container_that_lets_nobody_make_namespaces():
    """As Docker's default profile does: our own filter, put on the trainer, refuses the same calls."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user has one layer less, and is tried in test_escape.py")
    try:
        landlock.version()
    except OSError as error:
        pytest.skip(f"no landlock: {error}")
    path = os.pathsep.join(path for path in sys.path if path)
    command, environment = [sys.executable, "-c", CONTAINER], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    layers, missing, said = json.loads(done.stdout)
    assert layers == ["landlock", "seccomp", "user"]
    assert list(missing) == ["namespaces"]
    assert "unshare" in missing["namespaces"]
    assert int(said) >= OWN_USERS


def test_what_cannot_be_protected_is_said():
    with pytest.raises(WorkerError, match="files and network and processes cannot be protected"):
        Sandbox(LIMITS, layers=()).start()
    with pytest.raises(WorkerError, match="sandbox: network cannot be protected"):
        Sandbox(LIMITS, layers=("landlock",), require=("network",)).start()


@pytest.mark.parametrize(
    ("layers", "as_root", "said"),
    [
        (("namespaces",), True, {"files", "network", "processes"}),
        (("user",), True, {"processes"}),
        (("landlock", "seccomp"), False, {"files", "network", "processes"}),
        (("landlock", "seccomp"), True, {"files", "network"}),
        (("landlock",), False, set()),
        (("landlock", "user"), True, {"files", "processes"}),
        (("seccomp",), False, {"network"}),
        ((), False, set()),
    ],
)
def test_what_layers_protect(layers, as_root, said):
    """What runs as root is not held to a number of processes."""
    assert protected(layers, as_root) == said


def test_landlock_that_lets_an_owner_empty_files_is_for_other_users(monkeypatch):
    monkeypatch.setattr(landlock, "version", lambda: 2)
    jail = Jail(["landlock"], LIMITS, [], "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    jail.in_zygote()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(OSError, match="Linux 6.2"):
        jail.in_zygote()


def test_without_layers_there_are_limits_all_the_same():
    sandbox = Sandbox(Limits(seconds=1, memory_mb=100, file_mb=1), layers=(), require=())
    assert asyncio.run(sandbox.run("print(1)")).stdout == "1\n"
    assert asyncio.run(sandbox.run("while True: pass")).stopped == "time"
    assert "MemoryError" in asyncio.run(sandbox.run("x = bytes(10**9)")).stderr
    assert sandbox.layers == frozenset()
    sandbox.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limits": Limits(seconds=0)}, "seconds=0"),
        ({"limits": Limits(memory_mb=-1)}, "memory_mb=-1"),
        ({"limits": Limits(open_files=4)}, "open_files=4"),
        ({"limits": Limits(seconds=float("inf"))}, "seconds=inf"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"require": ("privacy",)}, "'privacy'"),
        ({"layers": ("walls",)}, "'walls'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Sandbox(**options)


def test_a_program_that_is_too_long(sandbox):
    result = asyncio.run(sandbox.run("#" * (pool.LONGEST_CODE + 1)))
    assert result == Result(stderr=f"the program has more than {pool.LONGEST_CODE} bytes", exit_code=1)


def test_environments_share_a_sandbox():
    assert shared_sandbox(LIMITS, (), 4, ()) is shared_sandbox(LIMITS, (), 4, ())
    assert shared_sandbox(LIMITS, (), 4, ()) is not shared_sandbox(LIMITS, (), 5, ())
