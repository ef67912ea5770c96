"""What stands between a program and everything else, and what each layer is good for.

    namespaces  a file system, process table, network and user id of its own; the best, if the kernel lets us
    user        a user id that nobody else has, taken by a trainer that is root
    landlock    of all files, those that it was given; for where there are no namespaces
    seccomp     system calls that computing does not need are refused; no network, in any case

Resource limits, a session of its own and the supervisor's clock are always there.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable

from miles_retool.sandbox import kernel, landlock, seccomp
from miles_retool.sandbox.limits import MIB, Limits

LAYERS = ("namespaces", "user", "landlock", "seccomp")
PROTECTS: dict[str, tuple[frozenset[str], ...]] = {
    "files": (frozenset({"namespaces"}), frozenset({"landlock", "user"}), frozenset({"landlock", "seccomp"})),
    "network": (frozenset({"namespaces"}), frozenset({"seccomp"})),
    "processes": (frozenset({"namespaces"}), frozenset({"user"}), frozenset({"landlock", "seccomp"})),
}
"""What is protected -> sets of layers each of which is enough for it."""
OWN_USERS = 0x70000000
"""The supervisor's process id is added: above what distributions give to users and to containers."""
INNER_USER = 1000
MOUNT_POINT = "/proc"
"""Where the new root is put together: a folder that is on every Linux, and below which no library lies."""
HOME = "/sandbox"
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random")  # no zero: shared mappings of it are memory that nobody counts
COVERED = ("site-packages", "dist-packages")
SWEEP_SECONDS = 10.0


def protected(layers: Iterable[str], as_root: bool = False) -> frozenset[str]:
    """What these layers protect, of `PROTECTS`. Programs that run as root are never counted: they may fork for ever."""
    have = frozenset(layers)
    found = {what for what, enough in PROTECTS.items() if any(some <= have for some in enough)}
    if as_root and not have & {"namespaces", "user"}:
        found.discard("processes")
    return frozenset(found)


class Jail:
    """A choice of layers, put on in three places: `in_zygote` once, `in_supervisor` and `in_program` for each call."""

    def __init__(self, layers: Iterable[str], limits: Limits, folders: Iterable[str], base: str):
        """Args:
        folders: what the program may read, such as the standard library.
        base: an empty folder that is there for this zygote alone.
        """
        self.layers, self.limits, self.base = frozenset(layers), limits, base
        self.folders = without_nested(folders)
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.users = "user" in self.layers  # whether programs take a user id of their own
        self.home = HOME

    # ---------------------------------------------------------------------------------------------------------- zygote

    def in_zygote(self) -> None:
        """Raises OSError when the kernel does not let us."""
        if self.users and os.geteuid() != 0:
            raise PermissionError("only root can take another user id")
        if "landlock" in self.layers and landlock.version() < landlock.TRUNCATES and os.geteuid() != 0:
            raise OSError("before Linux 6.2 landlock lets programs of the same user empty files")
        if "namespaces" in self.layers:
            self._take_root()
        else:
            self._readable = [os.open(path, os.O_PATH) for path in (*self.folders, "/dev/urandom")]
            self._writable = [os.open("/dev/null", os.O_PATH)]
        self._address_space = int(self._read("self/statm").split()[0]) * resource.getpagesize()

    def _take_root(self) -> None:
        """A network of nothing, and a mount namespace in which `/` holds folders and devices alone, to be read only."""
        self.users = os.geteuid() == 0
        try:
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET)
        except PermissionError:
            if self.users:  # root in name: of this user namespace, or without the right to mount
                take_user(OWN_USERS + os.getpid())
                self.users = False
            self._take_user_namespace(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET, os.geteuid())
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        small = (kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
        kernel.mount("tmpfs", MOUNT_POINT, "tmpfs", *small)
        writable = [MOUNT_POINT]
        for folder in self.folders:
            target = mount_point(MOUNT_POINT + folder, os.path.isdir(folder))
            kernel.bind_read_only(folder, target)
            for cover in (os.path.join(target, name) for name in COVERED):
                if os.path.isdir(cover):
                    kernel.mount("tmpfs", cover, "tmpfs", *small)
                    writable.append(cover)
        for device in DEVICES:
            kernel.mount(device, mount_point(MOUNT_POINT + device, is_folder=False), flags=kernel.MS_BIND)
        os.mkdir(MOUNT_POINT + HOME)
        for name in ("/tmp", "/dev/shm"):  # the second for locks of multiprocessing
            if not os.path.exists(MOUNT_POINT + name):
                os.symlink(HOME, MOUNT_POINT + name)
        for path in reversed(writable):
            flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | small[0]
            kernel.mount("none", path, flags=flags)
        kernel.enter_root(MOUNT_POINT)

    def _take_user_namespace(self, more: int, inner: int) -> None:
        """A user namespace, and others that it owns, in which this process is the user `inner`, with all rights."""
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER | more)
        for name, line in (("uid_map", f"{inner} {user} 1"), ("setgroups", "deny"), ("gid_map", f"{inner} {group} 1")):
            self._write(name, line)

    def _write(self, name: str, line: str) -> None:
        """To a file of this process in /proc."""
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self.proc)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------------------------------------------ supervisor

    def in_supervisor(self) -> None:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self.user = OWN_USERS + os.getpid()
        if "namespaces" in self.layers:
            if self.users:
                take_user(self.user)
            new = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
            if "seccomp" not in self.layers:
                new |= kernel.CLONE_NEWNET  # costs most; without sockets calls can share the zygote's, which is empty
            self._take_user_namespace(new, INNER_USER)
            return
        self.home = tempfile.mkdtemp(prefix="call-", dir=self.base)
        if self.users:
            os.chown(self.home, self.user, self.user)

    def sweep(self) -> None:
        """Kill what the program left behind, and remove its folder. A pid namespace ended with the program."""
        if "namespaces" in self.layers:
            return
        deadline = time.monotonic() + SWEEP_SECONDS
        while (left := self.descendants()) and time.monotonic() < deadline:
            if self.users:
                self._kill_all_of_user()
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            reap()
        remove(self.home)

    def _kill_all_of_user(self) -> None:
        """At one stroke: faster than any of them can fork."""
        killer = os.fork()
        if killer == 0:
            os.setresuid(self.user, self.user, self.user)  # unlike `take_user`: so that none of them can trace it
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)

    def descendants(self) -> list[int]:
        """Process ids of this process's descendants; orphans come to us, or to the first process of a pid namespace."""
        found: list[int] = []
        waiting = [os.getpid()]
        while waiting:
            parent = waiting.pop()
            with contextlib.suppress(OSError):
                children = self._children(parent)
                found += children
                waiting += children
        return found

    def _children(self, process: int) -> list[int]:
        children: list[int] = []
        for thread in self._threads(process):
            with contextlib.suppress(OSError):
                children += map(int, self._read(f"{thread}/children").split())
        return children

    def _threads(self, process: int | str) -> list[str]:
        """Their folders in /proc."""
        folder = os.open(f"{process}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        try:
            return [f"{process}/task/{thread}" for thread in os.listdir(folder)]
        finally:
            os.close(folder)

    def _read(self, path: str) -> str:
        """A file in /proc."""
        with open(os.open(path, os.O_RDONLY, dir_fd=self.proc)) as file:
            return file.read()

    def private_memory(self, process: int | str = "self") -> int:
        """Bytes that a process shares with no file. 0 when it is gone."""
        with contextlib.suppress(OSError):
            for thread in self._threads(process):  # the first may have ended before others: it then has no memory
                _, resident, shared, *_ = map(int, self._read(f"{thread}/statm").split())
                if resident:
                    return (resident - shared) * resource.getpagesize()
        return 0

    # --------------------------------------------------------------------------------------------------------- program

    def in_program(self) -> None:
        """The last thing that happens before foreign code runs: afterwards nothing but standard streams is open."""
        os.setsid()  # signals to its own group must not reach the supervisor
        alone = self.users or "namespaces" in self.layers
        with contextlib.suppress(OSError):  # first to go when memory is short; not everywhere may one say so
            self._write("oom_score_adj", "1000")
        if "namespaces" in self.layers:
            size = f"mode=700,size={self.limits.disk_mb}m,nr_inodes={self.limits.disk_mb * 64 + 64}"
            kernel.mount("tmpfs", HOME, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, size)
            socket.sethostname("sandbox")
        self._limit_resources()
        if self.users and "namespaces" not in self.layers:
            take_user(self.user)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(self.home)
        if "landlock" in self.layers:
            folder = os.open(".", os.O_PATH)
            landlock.restrict(self._readable, self._writable, folder)
        os.environ.update(HOME=self.home, TMPDIR=self.home)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 1_000)
        if "seccomp" in self.layers:
            seccomp.install(alone)

    def _limit_resources(self) -> None:
        limits, seconds = self.limits, int(self.limits.seconds) + 1
        for which, soft, hard in (
            (resource.RLIMIT_AS, self._address_space + limits.memory_mb * MIB, None),
            (resource.RLIMIT_CPU, seconds, seconds + 1),
            (resource.RLIMIT_FSIZE, limits.file_mb * MIB, None),
            (resource.RLIMIT_NPROC, limits.processes + ("namespaces" in self.layers), None),  # the supervisor counts
            (resource.RLIMIT_NOFILE, limits.open_files, None),
            (resource.RLIMIT_CORE, 0, None),
            (resource.RLIMIT_MEMLOCK, 0, None),
            (resource.RLIMIT_MSGQUEUE, 0, None),
            (resource.RLIMIT_SIGPENDING, 64, None),
        ):
            most = resource.getrlimit(which)[1]
            cap = [value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard or soft)]
            resource.setrlimit(which, (cap[0], cap[1]))


def take_user(user: int) -> None:
    """For good. Files of /proc about this process stay its own."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)


def mount_point(path: str, is_folder: bool) -> str:
    """An empty file or folder, for something to be mounted on."""
    os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
    if not is_folder:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    return path


def reap() -> None:
    """Children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def remove(folder: str) -> None:
    """With all that a program may have put into it: folders that nobody may enter, thousands deep, links to anywhere.

    Programs of the system do it. Python's own function gives up on the first two.
    """
    try:
        os.rmdir(folder)
    except OSError:
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], env={"PATH": os.defpath}, stderr=subprocess.DEVNULL)


def without_nested(folders: Iterable[str]) -> list[str]:
    """Real paths, those below another left out, the shortest first."""
    kept: list[str] = []
    for path in sorted({os.path.realpath(folder) for folder in folders}, key=lambda path: (path.count("/"), path)):
        if not any(path.startswith(f"{above}/") and not _covered(path, above) for above in kept):
            kept.append(path)
    return kept


def _covered(path: str, above: str) -> bool:
    return any(path.startswith(f"{above}/{name}/") for name in COVERED)
