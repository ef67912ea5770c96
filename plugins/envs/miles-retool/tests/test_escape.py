"""Programs that want out. None harms the trainer, each comes back as a result, and nothing of it is left.

Every test runs in each combination of layers; those that ask for what its layers do not protect are skipped there, and
say so. The `sandbox` fixture looks afterwards whether the sandbox still works and a process or file was left.
"""

import asyncio
import os
import pickle
import subprocess
import sys
import threading
import time

import psutil
import pytest

# ------------------------------------------------------------------------------------------------- time and processes

LOOPS = {
    "a loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "deaf to signals": (
        "import signal, time\n"
        "for number in range(1, 65):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: time.sleep(0.01)"
    ),
    "threads": (
        "import threading\ndef loop():\n    while True: pass\nfor _ in range(4): threading.Thread(target=loop).start()"
    ),
    "at exit": "import atexit, time; atexit.register(time.sleep, 1000)",
    "exceptions caught": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
}


@pytest.mark.parametrize("code", LOOPS.values(), ids=list(LOOPS))
def test_what_does_not_end_is_ended(run, code):
    started = time.monotonic()
    result = run(code)
    assert result.stopped == "time"
    assert 1.9 < result.seconds < time.monotonic() - started < 10


def test_processes_are_few(run):
    """Before anything that forks without end: the limit holds for a program that counts and stops."""
    code = """
import os, time
count = 0
try:
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        count += 1
except OSError as error:
    print(count, error.errno)
"""
    count, number = map(int, run(code).stdout.split())
    assert (count <= 11, number) == (True, 11)


def test_threads_are_few(run):
    code = """
import threading, time
count = 0
try:
    for _ in range(40):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
"""
    assert int(run(code).stdout) <= 11


def test_a_fork_bomb(run):
    assert run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass").stopped == "time"


def test_what_it_leaves_behind_ends_with_it(run, sandbox, processes):
    code = """
import os, signal, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (1, 2, 15):
                signal.signal(number, signal.SIG_IGN)
            for descriptor in range(3):
                os.close(descriptor)
            time.sleep(1000)
        os._exit(0)
print("gone")
"""
    result = run(code)
    assert (result.stdout, result.failed) == ("gone\n", False)
    assert result.seconds < 1.5
    assert [process for process in processes(sandbox) if is_asleep(process)][1:] == []


def is_asleep(process):
    try:
        return process.status() == "sleeping"
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------------------------------------------- memory and files


def test_a_memory_bomb(run):
    assert "MemoryError" in run("x = 'x' * 10**10").stderr
    result = run("pieces = []\nwhile True: pieces.append(bytearray(10**6))")
    assert "MemoryError" in result.stderr or result.stopped == "memory"


def test_memory_of_many_processes_is_counted_together(run):
    """Each stays below the limit for one."""
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        break
held = b"x" * (80 * 2**20)
time.sleep(100)
"""
    assert run(code).stopped == "memory"


def test_memory_of_a_process_without_its_first_thread(run):
    """Which the kernel says nothing about under the process's own name."""
    code = """
import ctypes, os, threading, time
def hold():
    held = b"x" * (80 * 2**20)
    time.sleep(100)
threading.stack_size(2**16)
for _ in range(3):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
time.sleep(100)
"""
    assert run(code).stopped == "memory"


WITHOUT_ADDRESS = {
    "memfd": "import os\nfor _ in range(8): os.write(os.memfd_create('m'), b'x' * 2**20)",
    "a socket that holds more": "import socket\n"
    "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**24)",
    "a page of a shared mapping": "import ctypes\nmap = ctypes.CDLL(None).mmap\nmap.restype = ctypes.c_ssize_t\n"
    "map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]\n"
    "if map(None, 4096, 3, 0x21, -1, 0) == -1: raise MemoryError",
}


@pytest.mark.parametrize("code", WITHOUT_ADDRESS.values(), ids=list(WITHOUT_ADDRESS))
def test_memory_without_an_address(run, sandbox, code):
    """Is there without `seccomp` alone, as the README says."""
    assert run(code).failed == ("seccomp" in sandbox.layers)


def test_a_huge_file(run):
    code = "with open('f', 'wb') as file:\n    for _ in range(100): file.write(bytes(2**20))"
    assert "File too large" in run(code).stderr


def test_many_files(run, sandbox):
    if "namespaces" not in sandbox.layers:
        pytest.skip("without namespaces the sum of all files is not limited")
    code = "for i in range(100):\n    with open(f'f{i}', 'wb') as file: file.write(bytes(2**20))"
    assert "No space left" in run(code).stderr
    assert "No space left" in run("for i in range(10**5): open(f'f{i}', 'w').close()").stderr


def test_open_files_are_few(run):
    assert "Too many open files" in run("kept = [open('f', 'w') for _ in range(100)]").stderr


def test_huge_output(run):
    for code in ("while True: print('x' * 1000)", "import os\nwhile True: os.write(2, b'x' * 10**6)"):
        result = run(code)
        assert result.stopped == "output"
        assert len(result.stdout) + len(result.stderr) == 32 * 1024


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture
def secret(tmp_path):
    """A file of the trainer's that everybody may read."""
    path = tmp_path / "weights"
    path.write_text("the secret")
    for folder in (path, *path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o5)
    return path


@pytest.mark.needs("files")
def test_other_files_cannot_be_read(run, secret):
    assert secret.read_text() == "the secret"
    for path in (
        secret,
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/meminfo",
        __file__,
        os.path.expanduser("~/.bashrc"),
    ):
        result = run(f"print(open({str(path)!r}).read())")
        assert result.failed, path
        assert "Error" in result.stderr


@pytest.mark.needs("files")
def test_other_folders_cannot_be_listed(run, secret):
    code = f"import os\nfor path in ('/tmp', '/root', '/home', {str(secret.parent)!r}):\n"
    code += "    try: print(*os.listdir(path))\n    except OSError: pass"
    assert run(code).stdout.replace("\n", "").replace(".pyenv", "") == ""


def test_other_folders_cannot_be_watched(run, sandbox):
    if "seccomp" not in sandbox.layers:
        pytest.skip("with namespaces there is but its own; else what everybody may read is not protected")
    code = "import ctypes; libc = ctypes.CDLL(None); print(libc.inotify_add_watch(libc.inotify_init(), b'/tmp', 0xfff))"
    assert run(code).stdout == "-1\n"


@pytest.mark.needs("files")
def test_other_files_cannot_be_written(run, secret):
    secret.chmod(0o666)
    secret.parent.chmod(0o777)
    for code in (f"open({str(secret)!r}, 'w')", f"open({str(secret.parent / 'new')!r}, 'w')", "open('/etc/new', 'w')"):
        assert run(code).failed
    assert secret.read_text() == "the secret"
    assert os.listdir(secret.parent) == ["weights"]


@pytest.mark.needs("files")
@pytest.mark.parametrize(
    "change", ["chmod(path, 0)", "utime(path, (1, 1))", "truncate(path, 0)", "setxattr(path, 'user.x', b'1')"]
)
def test_files_of_the_same_user_stay_as_they_are(run, secret, change, sandbox):
    """Landlock lets an owner do the most of this."""
    owner = os.stat(sandbox.base).st_uid
    os.chown(secret, owner, owner)
    before = os.stat(secret)
    assert run(f"import os; path = {str(secret)!r}; os.{change}").failed
    assert os.stat(secret) == before


def test_the_trainers_environment_is_not_there(run, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "the-secret")
    result = run("import os; print(dict(os.environ)); print(open('/proc/self/environ').read())")
    assert "HOME" in result.stdout
    assert "the-secret" not in result.stdout + result.stderr


@pytest.mark.needs("processes")
@pytest.mark.parametrize("file", ["environ", "mem", "maps", "fd/0", "cwd/pyproject.toml", "root/etc/shadow"])
def test_the_trainers_process_cannot_be_looked_into(run, file, sandbox):
    for process in (os.getpid(), sandbox.zygote_id):
        assert run(f"open('/proc/{process}/{file}', 'rb').read(1)").failed
    assert run(f"import os; open(f'/proc/{{os.getppid()}}/{file}', 'rb').read(1)").failed


def test_links_in_its_folder_lead_nowhere(run, sandbox, tmp_path):
    """What removes the folder must not follow them."""
    (tmp_path / "kept").write_text("kept")
    code = f"""
import os
os.symlink({str(tmp_path)!r}, 'folder')
os.symlink({str(tmp_path / "kept")!r}, 'file')
os.makedirs('a/b/c')
os.symlink('/', 'a/b/c/root')
os.symlink('.', 'itself')
try: os.chmod('a/b', 0)
except PermissionError: pass  # with the trainer's user id no modes are changed
print('made')
"""
    assert run(code).stdout == "made\n"
    assert (tmp_path / "kept").read_text() == "kept"
    assert os.listdir(sandbox.base) == []


def test_folders_within_folders(run, sandbox):
    """Deeper than a function that calls itself can go; landlock makes each slower than the one before."""
    result = run("import os\nfor _ in range(1500): os.mkdir('f'); os.chdir('f')\nprint('made')")
    assert result.stdout == "made\n" or "No space left" in result.stderr or result.stopped == "time"
    assert os.listdir(sandbox.base) == []


# -------------------------------------------------------------------------------------------------- others' processes


@pytest.mark.needs("processes")
def test_the_trainer_cannot_be_killed(run, sandbox):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    targets = [os.getpid(), sandbox.zygote_id, bystander.pid]
    for number in (9, 15, 19):
        for target in (*targets, "os.getppid()", 0, -1, *(-process for process in targets)):
            run(f"import os; os.kill({target}, {number})")
    assert bystander.poll() is None
    bystander.communicate(b"\n")
    assert bystander.returncode == 0


@pytest.mark.needs("processes")
def test_files_send_no_signals_to_the_trainer(run, sandbox):
    """From Linux 6.12 landlock is in the way as well, so that its victim lives does not say all."""
    owner = os.stat(sandbox.base).st_uid
    with subprocess.Popen(["sleep", "100"], user=owner) as bystander:
        code = (
            "import fcntl, os, socket\nours, theirs = socket.socketpair()\nfcntl.fcntl(ours, 10, 9)\n"
            f"fcntl.fcntl(ours, fcntl.F_SETOWN, {bystander.pid})\n"
            "fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)\ntheirs.send(b'x')"
        )
        result = run(code)
        time.sleep(0.1)
        assert bystander.poll() is None
        assert result.failed or "user" in sandbox.layers
        bystander.kill()


@pytest.mark.needs("processes")
def test_limits_and_priority_of_the_trainer_stay(run):
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    for line in (
        f"resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (3, 3))",
        f"os.setpriority(os.PRIO_PROCESS, {os.getpid()}, 19)",
        f"os.sched_setaffinity({os.getpid()}, [0])",
    ):
        assert run(f"import os, resource; {line}").failed
    assert before == (
        resource.getrlimit(resource.RLIMIT_NOFILE),
        os.getpriority(os.PRIO_PROCESS, 0),
        os.sched_getaffinity(0),
    )


@pytest.mark.needs("processes")
def test_the_trainer_cannot_be_traced(run):
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Piece(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
local, remote = Piece(ctypes.addressof(buffer), 8), Piece({id(object)}, 8)
print(libc.ptrace(16, {os.getpid()}, 0, 0))
print(libc.process_vm_readv({os.getpid()}, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
"""
    assert run(code).stdout == "-1\n-1\n"


def test_nobody_becomes_root(run):
    code = """
import os
for call in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.chroot('.'), lambda: os.setgid(0)):
    try:
        call()
        print('done')
    except PermissionError:
        pass
    except OSError as error:
        assert error.errno == 22  # no such id in its namespace
"""
    result = run(code)
    assert (result.stdout, result.exit_code) == ("", 0), result


def test_it_ends_with_its_supervisor_whether_it_wants_to_or_not(run, sandbox):
    code = "import ctypes; print(ctypes.CDLL(None).prctl(1, 0))"
    assert run(code).stdout == ("-1\n" if "seccomp" in sandbox.layers else "0\n")


def test_no_namespaces_of_its_own(run, sandbox):
    if "seccomp" not in sandbox.layers:
        pytest.skip("the kernel's own rules say who may make namespaces")
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), ctypes.get_errno())
print(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno())
print(libc.syscall(435, 0, 0), ctypes.get_errno())
"""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86_64")
    assert run(code).stdout.split() == ["-1", "1", "-1", "1", "-1", "38"]


# ---------------------------------------------------------------------------------------------- what comes back to us


class Bomb:
    def __reduce__(self):
        return os._exit, (66,)


def test_what_it_says_is_text_and_nothing_else(run):
    hostile = pickle.dumps(Bomb())
    result = run(f"import os; os.write(1, {hostile!r}); os.write(2, bytes(range(256)))")
    assert result.stdout == hostile.decode("utf-8", "replace")
    assert result.stderr == bytes(range(256)).decode("utf-8", "replace")


def test_no_answer_can_be_forged(run):
    """The trainer's socket, or anything else that was open, is not there."""
    code = """
import os
frame = b'{"stdout": "forged", "stderr": "", "exit_code": 0, "stopped": "", "seconds": 0}'
for descriptor in range(3, 2000):
    try:
        os.write(descriptor, len(frame).to_bytes(4, 'big') + frame)
        print('written to', descriptor)
    except OSError as error:
        assert error.errno == 9
os._exit(7)
"""
    result = run(code)
    assert (result.stdout, result.exit_code) == ("", 7)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; os.close(0); os.close(1); os.close(2); os._exit(3)", 3),
        ("import os; os.closerange(0, 100); print(1)", 1),
        ("import ctypes; ctypes.string_at(0)", -11),
        ("import os; os.abort()", None),
        ("raise SystemExit(300)", 300 & 0xFF),
        ("raise SystemExit('why')", 1),
        ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
        ("def f(", 1),
        ("\x00", 1),
        ("x = " + "(" * 5000, 1),
    ],
)
def test_odd_ends(run, code, exit_code):
    result = run(code)
    assert result.failed
    assert exit_code in (None, result.exit_code), result


# ---------------------------------------------------------------------------------------------- one call and the next


def test_calls_share_nothing(run):
    run("import builtins, os, sys, math\nopen('left', 'w').write('x'); builtins.print = None; math.pi = 3\nx = 1")
    result = run("import math, os\nprint(os.listdir('.'), math.pi > 3.1, 'x' in globals())")
    assert result.stdout == "[] True False\n"


def test_calls_at_the_same_time_do_not_meet(sandbox):
    """Neither by files, nor by process ids, nor by shared memory of System V (where there are namespaces)."""
    writer = "import os, time; open('mine', 'w').write('x'); print(os.getcwd(), os.getpid(), flush=True); time.sleep(1)"

    async def both():
        first = asyncio.create_task(sandbox.run(writer))
        await asyncio.sleep(0.4)
        second = await sandbox.run("import os; print(os.listdir('.'))")
        return await first, second

    first, second = asyncio.run(both())
    assert (first.failed, second.stdout) == (False, "[]\n")


def test_the_same_program_says_the_same(run):
    code = "import random; print(random.random(), hash('a'), {'b', 'c', 'd'})"
    assert run(code).stdout == run(code).stdout


def test_no_thread_of_the_trainer_is_needed(run):
    before = threading.active_count()
    assert (
        run("import threading; threading.Thread(target=print, args=('in a thread',)).start()").stdout == "in a thread\n"
    )
    assert threading.active_count() == before
