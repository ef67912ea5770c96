"""The corrections and presets keep the contracts of their kinds."""

from miles.testing import ISCorrectionContract, PresetContract

ONE_BY_ONE = "test_samples_are_corrected_one_by_one"


class TestTis(ISCorrectionContract):
    name = "tis"
    bad_options = [{"low": 3.0}, {"high": 0.5}, {"low": -1.0}, {"high": 0.0}, {"low": 1.0, "high": 1.0}]


class TestTisUnbounded(ISCorrectionContract):
    name = "tis"
    options = {"low": None, "high": None}


class TestIcePop(ISCorrectionContract):
    name = "icepop"
    bad_options = [{"low": 1.1}, {"high": 0.9}, {"low": None, "high": None}]


class TestM2po(ISCorrectionContract):
    name = "m2po"
    bad_options = [{"threshold": 0.0}, {"threshold": -1.0}]
    skips = {ONE_BY_ONE: "the mean that decides which tokens are dropped runs over the whole batch"}


class TestMis(ISCorrectionContract):
    name = "mis"
    bad_options = [
        {"low": 3.0},
        {"high": -2.0},
        {"high": 0.0},
        {"reject_low": 2.0, "reject_high": 0.5},
        {"reject_level": "none", "reject_high": 3.0},
        {"veto": 0.0},
        {"veto": 1.0},
        {"level": "geometric", "normalize": True},
        {"level": "none", "normalize": True},
        {"level": "none", "mode": "clip"},
        {"level": "none", "reject_level": "none", "veto": None},
    ]
    skips = {ONE_BY_ONE: "weights are divided by their mean over the batch, unless normalize is false"}


class TestMisBySample(ISCorrectionContract):
    name = "mis"
    options = {"level": "sequence", "mode": "clip", "reject_level": "geometric", "normalize": False}


class TestMisMask(ISCorrectionContract):
    name = "mis"
    options = {"mode": "mask", "reject_level": "none", "veto": None, "normalize": False}


class TestMisRejectingAlone(ISCorrectionContract):
    name = "mis"
    options = {"level": "none", "reject_level": "sequence"}


class TestBypass(PresetContract):
    name = "bypass"


class TestDecoupledPpo(PresetContract):
    name = "decoupled_ppo"
