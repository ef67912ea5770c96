"""The machine around a run: cores, memory, disk, and what the operating system allows."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from miles.diagnosis.finding import TRAINING, Finding

GIB = 1 << 30
ROOM_FOR_QUICKSTART = 1 << 28
"""Bytes: its data, two checkpoints and all samples take 40 MB; a quarter of a gibibyte leaves room for files beside."""
BUSY = 0.5
"""Processes that want a core, a core: with more, a run shares its cores. The doctor itself is one of them, briefly."""
CGROUP = Path("/sys/fs/cgroup")
NETWORK_FILES = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.", "9p", "cifs", "smb", "afs", "glusterfs", "wekafs")


def cores() -> Iterator[Finding]:
    """How many cores there are, may be used, and how many threads torch would start."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    usable = allowed if quota is None else min(allowed, max(1, int(quota)))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() else allowed
    limit = "" if quota is None else f", of which a control group allows {quota:g}"
    found = f"{os.cpu_count()} cores, {allowed} for this process{limit}; {threads} threads"
    found += f" (OMP_NUM_THREADS={wanted})" if wanted else ""
    facts = {
        "cores": os.cpu_count(),
        "allowed": allowed,
        "quota": quota,
        "threads": threads,
        "machine": platform.machine(),
    }
    if threads > usable:
        yield Finding(
            "cpu", "warn", f"{found}: more threads than cores wait for each other",
            f"--num-threads {usable}, or export OMP_NUM_THREADS={usable}", facts=facts,
        )  # fmt: skip
    else:
        yield Finding("cpu", "ok", found, facts=facts)


def load() -> Iterator[Finding]:
    """How much other programs have had to do in the last minute; nothing where the system does not tell."""
    with suppress(AttributeError, OSError):
        busy, cores = os.getloadavg()[0], os.cpu_count() or 1
        found, facts = f"{busy:.1f} on {cores} cores in the last minute", {"load": busy, "cores": cores}
        if busy > max(1.0, cores * BUSY):
            remedy = "wait for other programs, or end them: until then steps are slow, and timings mean nothing"
            yield Finding("load", "warn", f"{found}: other programs are at work", remedy, facts=facts)
        else:
            yield Finding("load", "ok", found, facts=facts)


def memory() -> Iterator[Finding]:
    """Memory that is free now, under the control group's limit where there is one."""
    free, total = _meminfo()
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and limit < total:
        free, total = min(free, max(limit - (used or 0), 0)), limit
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    facts = {"free_bytes": free, "total_bytes": total}
    if free < 2 * GIB:
        yield Finding(
            "memory", "warn", f"{found}: importing torch alone takes half a GiB", "end other programs", facts=facts
        )
    else:
        yield Finding("memory", "ok", found, facts=facts)


def cpu_quota() -> float | None:
    """Cores that a control group (a container's limit) allows; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((CGROUP / "cpu" / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _cgroup_bytes(name: str) -> int | None:
    with suppress(OSError, ValueError):
        return int((CGROUP / name).read_text())  # "max" is no number: no limit
    return None


def _meminfo() -> tuple[int, int]:
    """(available, total) bytes."""
    path = Path("/proc/meminfo")
    if path.exists():
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return tuple(1024 * int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return page * pages, page * pages  # what is free is not told here


# ----------------------------------------------------------------------------------------------------------------- disk


def folders() -> Iterator[Finding]:
    """The current folder (runs are written below it), temporary files, shared memory."""
    yield _folder("current folder", Path.cwd(), writes=True)
    yield _folder("temporary files", Path(tempfile.gettempdir()))
    if Path("/dev/shm").exists():
        usage = shutil.disk_usage("/dev/shm")
        found = f"/dev/shm: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
        facts = {"free_bytes": usage.free, "total_bytes": usage.total}
        if usage.total < GIB // 8:  # docker's default is 64 MB
            remedy = (
                "docker run --shm-size=1g, or --ipc=host; needed by NCCL and by loaders of data, not by one process"
            )
            yield Finding("shared memory", "warn", found, remedy, facts=facts)
        else:
            yield Finding("shared memory", "ok", found, facts=facts)


def _folder(name: str, path: Path, writes: bool = False) -> Finding:
    usage = shutil.disk_usage(path)
    kind = file_system(path)
    found = f"{path}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    found += f", {kind}" if kind else ""
    facts = {"path": str(path), "free_bytes": usage.free, "total_bytes": usage.total, "file_system": kind}
    stops = TRAINING if writes else ()
    problem = _unwritable(path)
    if usage.free < ROOM_FOR_QUICKSTART:
        return Finding(name, "fault", f"{found}: full", "free some space, or work elsewhere", stops, facts)
    if problem:
        return Finding(name, "fault", f"{found}: cannot be written: {problem}", "stand in another folder", stops, facts)
    if usage.free < 10 * GIB:
        remedy = "a checkpoint takes 12 bytes a parameter and two are kept: --save FOLDER, --keep-checkpoints 1"
        return Finding(name, "warn", found, remedy, facts=facts)
    if kind.startswith(NETWORK_FILES):
        remedy = (
            "one run directory must not be used from two machines at once: not every network file system locks files"
        )
        return Finding(name, "warn", f"{found}: a network file system", remedy, facts=facts)
    return Finding(name, "ok", found, facts=facts)


def file_system(path: Path) -> str:
    """Type of the file system that holds a path, as the kernel calls it; empty where that cannot be told."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    best = ("", "")
    for line in mounts.read_text().splitlines():
        _, point, kind = line.split()[:3]
        if path.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _unwritable(path: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"miles")
    except OSError as error:
        return error.strerror or str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ the process


def limits() -> Iterator[Finding]:
    """Files that may be open at once."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {"soft": soft, "hard": hard}
    if 0 <= soft < 1024:
        yield Finding("open files", "warn", f"{soft} (up to {hard})", f"ulimit -n {min(4096, hard)}", facts=facts)
    else:
        yield Finding("open files", "ok", f"{soft}", facts=facts)


def encoding() -> Iterator[Finding]:
    """Files are read and written in the encoding of the locale; data is UTF-8."""
    files, screen = locale.getpreferredencoding(False), sys.stdout.encoding or "ascii"
    facts = {"files": files, "stdout": screen}
    if all(name.lower().replace("-", "") == "utf8" for name in (files, screen)):
        yield Finding("encoding", "ok", "UTF-8", facts=facts)
    else:
        yield Finding(
            "encoding", "warn", f"files are {files}, the terminal {screen}: text beyond it fails",
            "export PYTHONUTF8=1, or LANG=C.UTF-8", facts=facts,
        )  # fmt: skip


def clock() -> Iterator[Finding]:
    """This machine's clock against the file system's, and against the day that miles was installed."""
    with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".miles-clock-") as file:
        skew = Path(file.name).stat().st_mtime - time.time()
    installed = Path(__file__).stat().st_mtime
    facts = {"file_system_skew_seconds": round(skew, 3)}
    if abs(skew) > 5:
        remedy = "set the clocks (chronyc, ntpdate): times in logs of several machines will not agree"
        yield Finding("clock", "warn", f"{skew:+.0f} seconds between file system and machine", remedy, facts=facts)
    elif time.time() < installed - 86400:
        remedy = "set the clock: certificates of the hub will not be accepted"
        yield Finding("clock", "warn", f"{time.ctime()} is before miles was installed", remedy, facts=facts)
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"), facts=facts)
