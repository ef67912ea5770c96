"""The mask keeps the contract of its kind."""

from miles.testing import LossMaskContract


class TestOpsm(LossMaskContract):
    name = "opsm"
    bad_options = [{"delta": -1.0}]
