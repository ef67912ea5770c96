"""The reward and the preset keep the contracts of their kinds."""

from miles.testing import PresetContract, RewardContract


class TestSoftOverlong(RewardContract):
    name = "soft_overlong"
    options = {"buffer_len": 40, "max_len": 100}
    cases = [("x" * 60, None, 0.0), ("x" * 70, None, -0.25), ("x" * 100, None, -1.0), ("x" * 101, None, -1.0)]
    bad_options = [
        {"buffer_len": 100},
        {"buffer_len": 0},
        {"max_len": 0},
        {"factor": 0.0},
        {"factor": -1.0},
        {"factor": float("inf")},
        {"factor": float("nan")},
    ]


class TestDapo(PresetContract):
    name = "dapo"
