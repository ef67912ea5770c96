"""Layer `landlock`: of all files, the program sees those that it was given. See landlock(7)."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Sequence

from miles_retool.sandbox.kernel import syscall

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Kernel's version of landlock -> how many rights over files it knows; later ones know 16."""
TRUNCATES = 3
"""The version that knows `TRUNCATE`."""


def version() -> int:
    """Of the kernel's landlock. Raises OSError when there is none."""
    return syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))


def restrict(readable: Sequence[int], writable: Sequence[int], folder: int) -> None:
    """For this process and its descendants, for good. Needs no_new_privs.

    Args:
        readable: descriptors of files and folders; of folders, all below them.
        writable: of files that may be written to as well.
        folder: where everything is allowed but to execute.
    """
    known = version()
    every = (1 << _FILE_RIGHTS.get(known, 16)) - 1
    attributes = struct.pack("QQQ", every, 0b11 if known >= 4 else 0, 0b11 if known >= 6 else 0)
    size = 8 if known < 4 else 16 if known < 6 else 24
    ruleset = syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    for descriptor in readable:
        _allow(ruleset, descriptor, READ_FILE | READ_DIR)
    for descriptor in writable:
        _allow(ruleset, descriptor, (READ_FILE | WRITE_FILE | TRUNCATE) & every)
    _allow(ruleset, folder, every & ~1)
    syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, descriptor: int, rights: int) -> None:
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= ~READ_DIR
    rule = struct.pack("=Qi", rights, descriptor)
    syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint32(0))
