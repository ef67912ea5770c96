"""The loss and the preset keep the contracts of their kinds."""

from miles.testing import PolicyLossContract, PresetContract


class TestDppo(PolicyLossContract):
    name = "dppo_tv"
    bad_options = [{"delta": -0.1}, {"delta_high": 1.5}, {"truncation": 0.5}]


class TestDppoUntruncated(PolicyLossContract):
    name = "dppo_tv"
    options = {"truncation": None}


class TestDppoPreset(PresetContract):
    name = "dppo"
