"""The filter, interpreted as the kernel does: also for the machine that the tests do not run on."""

import errno
import socket

import pytest
from miles_retool.sandbox import seccomp
from miles_retool.sandbox.seccomp import AUDIT_ARCH, HAS, IS, LOAD, RETURN, program

FINE, REFUSED = seccomp.ALLOW, seccomp.ERRNO | errno.EPERM
CLONE_THREAD, SIGCHLD = 0x10000, 17


def verdict(machine, alone, number, *arguments):
    """What becomes of one system call; the lower half of its arguments is all that the filter reads."""
    data = {seccomp.NUMBER: number, seccomp.ARCH: AUDIT_ARCH[machine]}
    data |= dict(zip(seccomp.ARGUMENTS, arguments, strict=False))
    lines, at, value = program(machine, alone), 0, 0
    while True:
        what, if_so, if_not, operand = lines[at]
        at += 1
        if what == RETURN:
            return operand
        if what == LOAD:
            value = data[operand]
        else:
            holds = {IS: value == operand, HAS: bool(value & operand), seccomp.AT_LEAST: value >= operand}[what]
            at += if_so if holds else if_not


CALLS = [  # name, arguments, what becomes of it; None: refused unless alone
    ("SOCKETPAIR", (socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0), FINE),
    ("SOCKETPAIR", (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0), FINE),
    ("SOCKETPAIR", (socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0), REFUSED),
    ("SOCKETPAIR", (socket.AF_UNIX, socket.SOCK_RAW, 0), REFUSED),
    ("SOCKETPAIR", (30, socket.SOCK_STREAM, 0), REFUSED),
    ("MMAP", (0, 4096, 3, 0x02 | 0x20), FINE),  # private memory
    ("MMAP", (0, 4096, 3, 0x01), FINE),  # a file
    ("MMAP", (0, 4096, 3, 0x01 | 0x20), REFUSED),
    ("MMAP", (0, 4096, 3, 0x03 | 0x20), REFUSED),
    ("CLONE", (CLONE_THREAD, 0), FINE),
    ("CLONE", (seccomp.CLONE_NEWUSER | SIGCHLD, 0), REFUSED),
    ("CLONE3", (0, 0), seccomp.ERRNO | errno.ENOSYS),
    ("PRLIMIT", (0, 7), FINE),
    ("PRLIMIT", (1234, 7), REFUSED),
    ("PRCTL", (15, 0), FINE),  # a name
    ("PRCTL", (1, 0), REFUSED),
    ("FCNTL", (3, 4), FINE),  # F_SETFL
    ("FCNTL", (3, 8), None),
    ("FCNTL", (3, 15), None),
    ("IOCTL", (3, 0x5413), FINE),  # a terminal's size
    ("IOCTL", (3, 0x8901), None),
]


@pytest.mark.parametrize("machine", AUDIT_ARCH)
@pytest.mark.parametrize(("name", "arguments", "said"), CALLS)
def test_calls_that_depend_on_their_arguments(machine, name, arguments, said):
    number = getattr(seccomp, name)[list(AUDIT_ARCH).index(machine)]
    for alone in (True, False):
        expected = said if said is not None else FINE if alone else REFUSED
        assert verdict(machine, alone, number, *arguments) == expected


@pytest.mark.parametrize("machine", AUDIT_ARCH)
def test_calls_that_are_refused_always(machine):
    which = list(AUDIT_ARCH).index(machine)
    for numbers in (seccomp.REFUSED | seccomp.TOUCHING_OTHERS).values():
        if (number := numbers[which]) is not None:
            assert verdict(machine, False, number) == REFUSED
            assert verdict(machine, True, number) == (REFUSED if numbers in seccomp.REFUSED.values() else FINE)
    assert verdict(machine, True, {"x86_64": 39, "aarch64": 172}[machine]) == FINE  # getpid
