"""The program itself: code as `__main__`, its errors as Python prints them."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import linecache
import os
import random
import sys
import threading
import traceback
import types
from io import TextIOWrapper
from typing import cast

FILE = "<code>"


def run(code: str) -> None:
    """Run it to its end, and end this process. The exit code is that of `python -c`."""
    status = 1
    try:
        streams = _stream(0, "r"), _stream(1, "w"), _stream(2, "w")
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
        sys.argv = ["-c"]
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # those of `site`, which was not loaded
        random.seed(0)  # the same code prints the same
        status = _execute(code)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of a program
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr, *streams[1:]):  # it may have put others in their place, or closed some
            with contextlib.suppress(AttributeError, ValueError):
                stream.flush()
    except BaseException:
        os._exit(status or 1)
    os._exit(status)


def _stream(descriptor: int, mode: str) -> TextIOWrapper:
    return cast(TextIOWrapper, open(descriptor, mode, 1, encoding="utf-8", errors="backslashreplace", closefd=False))


def _execute(code: str) -> int:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
    try:
        exec(compile(code, FILE, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return (exit.code or 0) & 0xFF
        print(exit.code, file=sys.stderr)
        return 1
    except BaseException as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None  # without the line above
        traceback.print_exception(type(error), error, own)
        return 1
    return 0
