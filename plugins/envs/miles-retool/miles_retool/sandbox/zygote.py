"""The process that forks supervisors: started once, with the modules imported that programs are likely to use.

It reads from a socket of packets: a descriptor a packet, the connection of a call. It ends with that socket, and so
with the trainer. Its first packet to the trainer says which layers are on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback

from miles_retool.sandbox.call import supervise
from miles_retool.sandbox.layers import Jail
from miles_retool.sandbox.limits import Limits

IMPORTED = """
    array ast asyncio base64 bisect bz2 calendar cmath collections contextlib copy csv ctypes dataclasses datetime
    decimal enum fractions functools hashlib heapq io itertools json lzma math multiprocessing numbers operator pprint
    queue random re secrets sqlite3 ssl statistics string struct subprocess sys tempfile textwrap threading time types
    typing unicodedata uuid zlib zoneinfo
"""
"""Those that are used most, and those that load libraries of the system, which a program cannot find. All others can be
imported, a little slower. Some Pythons are built without some of these."""
HELLO_BYTES = 65536


def main(descriptor: int, settings: dict) -> None:
    """Args:
    settings: `limits`, `layers` (which may be put on), `packages`, `paths` (where these are), `base`.
    """
    control, as_root = socket.socket(fileno=descriptor), os.geteuid() == 0
    try:
        folders = [path for path in sys.path if os.path.isdir(path)]
        folders += import_ahead(settings["packages"], settings["paths"])
        leave_threads()
        jail, missing = strongest(settings, folders)
    except BaseException:
        control.send(json.dumps({"error": traceback.format_exc()}).encode()[:HELLO_BYTES])
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are nobody's zombies
    gc.collect()
    gc.freeze()
    hello = {"layers": sorted(jail.layers), "missing": missing, "as_root": as_root}
    control.send(json.dumps(hello).encode()[:HELLO_BYTES])
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        connection = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            control.close()
            supervise(connection, jail)
        connection.close()


def import_ahead(packages: list[str], paths: list[str]) -> list[str]:
    """Import modules; returns the folders and files of what does not belong to the standard library."""
    for name in IMPORTED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if not packages:
        return []
    sys.path += paths
    for name in packages:
        importlib.import_module(name)
    places = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        above = [path for path in sys.path if file.startswith(f"{path}/")]
        if above and not name.startswith("miles_retool"):
            path = max(above, key=len)  # a project's folder may hold an environment's, and that the package
            top = file[len(path) + 1 :].split("/")[0]
            places |= {f"{path}/{top}", *(f"{path}/{top}.libs" for _ in "1" if os.path.isdir(f"{path}/{top}.libs"))}
    return sorted(places)


def leave_threads() -> None:
    """Go on in a fork when a package has started threads: a process with threads may not make a user namespace."""
    if len(os.listdir("/proc/self/task")) > 1 and (child := os.fork()):
        os._exit(os.waitpid(child, 0)[1] and 1)


def strongest(settings: dict, folders: list[str]) -> tuple[Jail, dict[str, str]]:
    """A jail of all layers that work here, put on this process, and why the others do not.

    Each is tried on a child, which is given a program to run: that a system call exists says little about whether a
    container lets it through.
    """
    limits, missing, working = Limits(**settings["limits"]), {}, []
    for layer in settings["layers"]:
        trouble = tried(Jail([layer], limits, folders, settings["base"]))
        if trouble:
            missing[layer] = trouble
        else:
            working.append(layer)
    if "namespaces" in working and "landlock" in working:
        working.remove("landlock")  # no file is left that it could keep from a program
    jail = Jail(working, limits, folders, settings["base"])
    jail.in_zygote()
    return jail, missing


def tried(jail: Jail) -> str:
    """What is wrong with a jail, or nothing."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        trouble = ""
        try:
            jail.in_zygote()
            jail.in_supervisor()
            inner = os.fork()
            if inner == 0:
                try:
                    trial(jail, theirs)
                finally:
                    os._exit(1)
            os.waitpid(inner, 0)
            jail.sweep()
        except BaseException as error:
            trouble = f"{type(error).__name__}: {error}"
            theirs.send(trouble.encode()[:1000])
        finally:
            os._exit(0)
    theirs.close()
    said = b"".join(iter(lambda: ours.recv(1000), b""))
    os.waitpid(child, 0)
    ours.close()
    os.close(jail.proc)
    return "" if said == b"fine" else said.decode() or "its process ended without a word"


def trial(jail: Jail, connection: socket.socket) -> None:
    """Put everything on."""
    try:
        os.dup2(connection.fileno(), 1)
        jail.in_program()
        os.write(1, b"fine")
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}".encode()[:1000])
