"""Executor `local`: processes of this machine."""

from miles.testing import ExecutorContract


class TestLocal(ExecutorContract):
    name = "local"
