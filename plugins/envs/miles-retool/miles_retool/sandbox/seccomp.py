"""Layer `seccomp`: system calls that computing does not need fail with EPERM.

The filter is a BPF program that the kernel runs at every system call of a process and of all its descendants: load the
number, compare it with each that is refused, allow the rest. An interpreter needs too many system calls for a list of
allowed ones to stay true from one libc to the next, so this is a list of refused ones: it takes away the network and
much of the kernel's surface, and is no wall by itself. See seccomp(2) and `struct seccomp_data` there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from miles_retool.sandbox.kernel import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_PDEATHSIG,
    check,
    libc,
)

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED: dict[str, tuple[int, int | None]] = {  # name: (x86_64, aarch64, None where it has no such call)
    "socket": (41, 198),
    "setsockopt": (54, 208),  # how much a socket holds, which no limit of the process counts
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "inotify_init": (253, None),  # tells the names of files in folders that landlock lets nobody list
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),  # memory that no limit of the process counts
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
TOUCHING_OTHERS: dict[str, tuple[int, int | None]] = {  # refused where programs have the trainer's user id and see it
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "chmod": (90, None),  # from here on: what landlock lets an owner do to any file
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "truncate": (76, 45),
}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
SOCKETPAIR, MMAP, PRCTL, FCNTL, IOCTL = (53, 199), (9, 222), (157, 167), (72, 25), (16, 29)
AF_UNIX, UNCONNECTED = 1, 0b1010  # the second: bits of a socket's type that neither STREAM nor SEQPACKET has
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
F_SETOWN, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP = 8, 15, 0x8901, 0x8902
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET

LOAD, IS, HAS, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, (16, 24, 32, 40)  # offsets in struct seccomp_data
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]
"""What to do, how many instructions to leave out if so and if not, and an operand."""
REFUSE, UNKNOWN = (RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ERRNO | errno.ENOSYS)
BY_ARGUMENT: dict[tuple[int, int], list[Instruction]] = {
    CLONE: [(LOAD, 0, 0, ARGUMENTS[0]), (HAS, 0, 1, NAMESPACES), REFUSE],
    PRLIMIT: [(LOAD, 0, 0, ARGUMENTS[0]), (IS, 1, 0, 0), REFUSE],
    PRCTL: [(LOAD, 0, 0, ARGUMENTS[0]), (IS, 0, 1, PR_SET_PDEATHSIG), REFUSE],  # so that it ends with its supervisor
    SOCKETPAIR: [  # asyncio needs pairs of streams; pairs of datagrams may also send to others
        *((LOAD, 0, 0, ARGUMENTS[0]), (IS, 1, 0, AF_UNIX), REFUSE),
        *((LOAD, 0, 0, ARGUMENTS[1]), (HAS, 0, 1, UNCONNECTED), REFUSE),
    ],
    MMAP: [  # such memory stays when all but a page of it is unmapped, and then no limit of the process counts it
        *((LOAD, 0, 0, ARGUMENTS[3]), (HAS, 0, 2, MAP_SHARED), (HAS, 0, 1, MAP_ANONYMOUS), REFUSE),
    ],
}
"""System call -> what refuses it for some of its arguments."""
OWNERS: dict[tuple[int, int], list[Instruction]] = {
    FCNTL: [(LOAD, 0, 0, ARGUMENTS[1]), (IS, 0, 1, F_SETOWN), REFUSE, (IS, 0, 1, F_SETOWN_EX), REFUSE],
    IOCTL: [(LOAD, 0, 0, ARGUMENTS[1]), (IS, 0, 1, FIOSETOWN), REFUSE, (IS, 0, 1, SIOCSPGRP), REFUSE],
}
"""The same, of `TOUCHING_OTHERS`: a file can send any signal to its owner."""


def program(machine: str, alone: bool) -> list[Instruction]:
    """The filter.

    Args:
        machine: `uname -m`.
        alone: nobody else has this user id, or can be seen: signals reach only the program's own processes.
    """
    which = list(AUDIT_ARCH).index(machine)
    refused = REFUSED if alone else REFUSED | TOUCHING_OTHERS
    filters = [(LOAD, 0, 0, ARCH), (IS, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        filters += [(AT_LEAST, 0, 1, X32), REFUSE]
    filters += _when(CLONE3[which], UNKNOWN)  # its flags cannot be seen; the C library then takes `clone`
    for numbers in refused.values():
        if (number := numbers[which]) is not None:
            filters += _when(number, REFUSE)
    for calls, lines in (BY_ARGUMENT if alone else BY_ARGUMENT | OWNERS).items():
        filters += _when(calls[which], *lines)
    return [*filters, (RETURN, 0, 0, ALLOW)]


def _when(number: int, *lines: Instruction) -> list[Instruction]:
    """Lines for one system call. Those behind them find its number loaded again."""
    return [(IS, 0, len(lines) + 1, number), *lines, (LOAD, 0, 0, NUMBER)]


def install(alone: bool) -> None:
    """For this process and its descendants, for good. Needs no_new_privs.

    Raises:
        OSError: the kernel has no filters, or the machine is not of a kind that the table knows.
    """
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    instructions = program(machine, alone)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in instructions))
    filters = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    check(libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), filters, zero, zero), "seccomp filter")
